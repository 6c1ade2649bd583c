from __future__ import annotations

import pytest
import torch

from fewbits.losses.dice import SMOOTH, soft_dice


def by_hand(logits: torch.Tensor, target: torch.Tensor, ignore: int, ground: int | None) -> float:
    share, parts = logits.softmax(1), []
    for c in range(logits.shape[1]):
        both = total = there = 0.0
        for b, y, x in (target != ignore).nonzero().tolist():
            right = int(target[b, y, x]) == c
            both, there = both + right * float(share[b, c, y, x]), there + right
            total += right + float(share[b, c, y, x])
        if there and c != ground:
            parts.append(1 - (2 * both + SMOOTH) / (total + SMOOTH))
    return sum(parts) / len(parts)


@pytest.mark.parametrize("ground", [None, 0])
def test_it_is_the_fraction_of_the_paper(ground: int | None) -> None:
    logits, target = torch.randn(2, 4, 3, 5), torch.randint(0, 3, (2, 3, 5))  # class 3 is nowhere
    target[0, 0] = 9
    found = soft_dice(logits, target, ignore=9, ground=ground)
    assert float(found) == pytest.approx(by_hand(logits, target, 9, ground), abs=1e-5)


def test_right_answers_cost_nothing_and_wrong_ones_all() -> None:
    target = torch.randint(0, 2, (1, 40, 40))
    right = 50.0 * torch.nn.functional.one_hot(target, 2).movedim(-1, 1).float()
    assert float(soft_dice(right, target)) == pytest.approx(0, abs=1e-6)
    assert float(soft_dice(-right, target)) > 0.99


def test_gradients_come_from_counted_pixels_only() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    target = torch.randint(0, 2, (1, 4, 4))
    target[:, 1] = 255
    soft_dice(logits, target, ignore=255).backward()
    assert logits.grad is not None and not logits.grad[:, :, 1].any() and logits.grad[:, :, 0].all()


def test_nothing_to_count_is_zero_with_a_gradient() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = soft_dice(logits, torch.full((1, 4, 4), 255), ignore=255)
    loss.backward()
    assert loss.item() == 0
