"""The widths of the method's release: moved by their regulariser, deaf to the task."""

from __future__ import annotations

import pytest
import torch

from fewbits.errors import PlanError
from fewbits.plan import TensorPlan
from fewbits.quantizers import ReleasedBits, make_quantizer
from fewbits.quantizers.released_bits import bits_of, penalty, theta_of

STARTS = torch.tensor([4.0, 8.0, 16.0])


def trained(release: str, steps: int, lowest: float, highest: float, strength: bool = True) -> list[float]:
    """Return the widths after so many steps of the release's AdamW (rate 3e-3, decay 0.01)."""
    start = theta_of(STARTS, lowest, highest, release)
    theta = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theta], lr=3e-3, weight_decay=0.01)
    for _ in range(steps if strength else 0):
        optimizer.zero_grad()
        penalty(theta, start, release).backward()
        optimizer.step()
    return [float(b) for b in bits_of(theta.detach(), lowest, highest)]


def test_the_first_release_slides_to_two_widths_whatever_they_are_worth() -> None:
    assert trained("v1", 125, 2, 16) == pytest.approx([2.0, 4.1, 16.0], abs=0.3)
    assert trained("v1", 500, 2, 16) == pytest.approx([2.0, 2.0, 15.97], abs=0.05)
    assert trained("v1", 1500, 2, 16)[2] == pytest.approx(14.3, abs=0.2)


def test_the_later_release_stays_where_it_starts() -> None:
    start = [float(b) for b in bits_of(theta_of(torch.tensor([4.0, 8.0]), 2, 8, "head"), 2, 8)]
    assert start == pytest.approx([4.0, 7.7], abs=0.01), "an 8 starts at 7.7"
    after = trained("head", 300, 2, 8)
    assert after[0] == pytest.approx(4.0, abs=0.05) and after[1] == pytest.approx(7.7, abs=0.05)


@pytest.mark.parametrize("release", ["v1", "head"])
def test_the_task_gives_theta_no_gradient(release: str) -> None:
    plan = TensorPlan(8, "released_bits", granularity="channel", channel_bits=(2, 5, 8), options={"release": release})
    made = make_quantizer(plan, shape=(3, 7))
    assert isinstance(made, ReleasedBits)
    x = torch.randn(3, 7, requires_grad=True)
    y = made(x)
    y.square().sum().backward()
    assert made.theta.grad is None and x.grad is not None and bool((x.grad != 0).any())
    assert torch.equal(made.encode(x).decode(), y)
    assert made.settled_plan().channel_bits == (2, 5, 8)


def test_values_out_of_range_are_told() -> None:
    with pytest.raises(PlanError, match="released bits need"):
        make_quantizer(TensorPlan(4, "released_bits", options={"release": "v2"}), shape=(2, 2))
