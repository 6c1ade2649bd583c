from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewbits.tasks.boundary import boundary_f1, outlines
from fewbits.tasks.masks import IGNORE


def points(mask: Tensor, kind: int) -> list[tuple[int, int]]:
    """The outline of a class, pixel by pixel."""
    height, width = mask.shape
    found = []
    for y in range(height):
        for x in range(width):
            near = [(y + dy, x + dx) for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0))]
            others = [int(mask[p]) for p in near if 0 <= p[0] < height and 0 <= p[1] < width]
            if int(mask[y, x]) == kind and any(o not in (kind, IGNORE) for o in others):
                found.append((y, x))
    return found


def by_hand(answer: Tensor, mask: Tensor, tolerance: int) -> float:
    answer, scores = answer.where(mask != IGNORE, IGNORE), []
    for kind in sorted({*answer.flatten().tolist(), *mask.flatten().tolist()} - {IGNORE}):
        got, want = points(answer, kind), points(mask, kind)
        if not got and not want:
            continue
        precision, recall = (
            sum(any(math.dist(p, q) <= tolerance for q in others) for p in some) / len(some) if some else 0.0
            for some, others in ((got, want), (want, got))
        )
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("tolerance", [0, 1, 2, 3])
def test_it_equals_the_distances_of_all_pairs(tolerance: int) -> None:
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        mask, answer = (
            torch.randint(0, 3, (2, 4, 5), generator=generator).repeat_interleave(3, 1).repeat_interleave(3, 2)
        )
        mask[:2, 5:9] = IGNORE
        assert boundary_f1(answer, mask, tolerance) == pytest.approx(by_hand(answer, mask, tolerance), abs=1e-6)


def test_outlines_are_inside_their_class_and_not_at_the_border() -> None:
    mask = torch.zeros(7, 7, dtype=torch.int64)
    mask[2:5, 2:5] = 1
    inner = outlines(mask, torch.tensor([0, 1]))
    assert inner[1].sum() == 8 and not inner[1, 3, 3]
    assert inner[0].sum() == 12 and not inner[0, 0].any()


def test_a_shift_within_the_tolerance_is_forgiven() -> None:
    mask, moved = torch.zeros(2, 20, 20, dtype=torch.int64)
    mask[5:15, 5:15] = 1
    moved[5:15, 7:17] = 1
    assert boundary_f1(moved, mask, 2) == 1 > boundary_f1(moved, mask, 1)
    assert math.isnan(boundary_f1(mask * 0, mask * 0, 2))
    assert boundary_f1(mask * 0, mask, 2) == 0
