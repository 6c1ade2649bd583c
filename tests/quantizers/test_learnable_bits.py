from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewbits.errors import PlanError
from fewbits.plan import TensorPlan
from fewbits.quantizers import LearnableBits, MaxAbs, make_quantizer, project


def quantizer(widths: tuple[int, ...], length: int, **options: object) -> LearnableBits:
    plan = TensorPlan(max(widths), "learnable_bits", granularity="channel", channel_bits=widths, options=options)
    made = make_quantizer(plan, shape=(len(widths), length))
    assert isinstance(made, LearnableBits)
    return made


def gradient(made: LearnableBits, x: Tensor, upstream: Tensor) -> Tensor:
    (made(x) * upstream).sum().backward()
    assert made.width.grad is not None
    return made.width.grad


def test_golden_of_the_straight_through_gradient() -> None:
    made, x = quantizer((3,), 4), torch.tensor([[0.8, -0.5, 0.3, -0.1]])
    assert made(x)[0].tolist() == pytest.approx([0.8, -0.53333, 0.26667, 0], abs=1e-5)
    assert gradient(made, x, torch.ones(1, 4)).tolist() == pytest.approx([-0.0308065], abs=1e-6)


def test_the_gradient_is_that_of_the_straight_through_graph() -> None:
    """y = s (x / s + stop(round(x / s) - x / s)), s = a / (2^(b - 1) - 1), for a thousand channels."""
    x, upstream = torch.randn(1000, 6, dtype=torch.float64), torch.randn(1000, 6, dtype=torch.float64)
    widths = tuple(torch.randint(2, 9, (1000,)).tolist())
    made = quantizer(widths, 6).double()
    width = torch.tensor(widths, dtype=torch.float64, requires_grad=True)
    scale = (x.abs().amax(1) / (2 ** (width - 1) - 1))[:, None]
    held = (x / scale).detach()
    # the rounded code stays, the straight-through part moves with the scale
    y = scale * held.round() - (scale * held - x)
    (y * upstream).sum().backward()
    assert width.grad is not None
    torch.testing.assert_close(gradient(made, x, upstream), width.grad, rtol=1e-9, atol=1e-12)


def test_the_fractional_mode_is_a_mixture_with_the_gradient_of_finite_differences() -> None:
    made = quantizer((3, 5, 8), 50, mode="frac").double().train()
    with torch.no_grad():
        made.width.copy_(torch.tensor([2.3, 5.75, 7.9]))
    x, upstream = torch.randn(3, 50, dtype=torch.float64), torch.randn(3, 50, dtype=torch.float64)
    for row, (low, f) in enumerate(((2, 0.3), (5, 0.75), (7, 0.9))):
        less, more = (quantizer((b,), 50).double()(x[row : row + 1]) for b in (low, low + 1))
        torch.testing.assert_close(made(x)[row : row + 1], (1 - f) * less + f * more)
    found = gradient(made, x, upstream).clone()
    for row in range(3):
        ends = []
        for step in (-1e-4, 1e-4):
            with torch.no_grad():
                made.width[row] += step
                ends.append(float((made(x) * upstream).sum()))
                made.width[row] -= step
        assert float(found[row]) == pytest.approx((ends[1] - ends[0]) / 2e-4, rel=1e-6)


def test_what_is_stored_is_what_is_forwarded_and_settles_to_maxabs() -> None:
    made, x = quantizer((2, 4, 8), 7), torch.randn(3, 7)
    with torch.no_grad():
        made.width.copy_(torch.tensor([2.4, 5.6, 7.2]))
    codes = made.encode(x)
    assert codes.channel_bits == (2, 6, 7) == tuple(made.current().tolist()) and codes.bits == 7
    assert torch.equal(codes.decode(), made(x))
    plan = made.settled_plan()
    settled = make_quantizer(plan, shape=(3, 7))
    assert type(settled) is MaxAbs and plan.channel_bits == (2, 6, 7) and torch.equal(settled(x), made(x))
    with torch.no_grad():
        made.width.fill_(4.1)
    assert made.settled_plan().channel_bits is None and made.settled_plan().bits == 4


def test_a_mixture_is_for_training_alone() -> None:
    made, x = quantizer((2,), 9, mode="frac"), torch.randn(1, 9)
    with torch.no_grad():
        made.width.fill_(3.5)
    made.train()
    mixed = made(x)
    made.eval()
    assert torch.equal(made(x), made.encode(x).decode()) and not torch.equal(mixed, made(x))
    made.train().frozen = True
    assert torch.equal(made(x), made.eval()(x))


def test_frozen_widths_come_back_from_a_checkpoint() -> None:
    made = quantizer((2, 5), 3)
    made.frozen = True
    again = quantizer((8, 8), 3)
    again.load_state_dict(made.state_dict())
    assert again.frozen and not again.width.requires_grad and again.current().tolist() == [2, 5]


def test_projection_is_exact() -> None:
    sizes = torch.tensor([1.0, 2.0, 3.0, 4.0])
    widths = torch.tensor([2.9, 3.5, 4.2, 7.9])
    # down: 2 3 4 7 = 48; budget 5 is 50 of 10: 7.9 needs 4, 2.9 needs 1, then 3.5 needs 2 and 1 is left
    assert project(widths, sizes, 5.0, 2, 8).tolist() == [3, 3, 4, 7]
    # budget 4 is 40: 3 less from 4.2, 2 from 3.5, and 4 from 7.9, as 2.9 is at the lowest
    assert project(widths, sizes, 4.0, 2, 8).tolist() == [2, 2, 3, 6]
    assert project(widths, sizes, 2.0, 2, 8).tolist() == [2, 2, 2, 2]
    for _ in range(50):
        n = torch.randint(1, 30, (40,)).float()
        b = 2 + 6 * torch.rand(40)
        budget = 2 + 6 * float(torch.rand(()))
        whole = project(b, n, budget, 2, 8)
        spent = float((n * whole).sum() / n.sum())
        assert spent <= budget + 1e-6 and bool(((whole >= 2) & (whole <= 8)).all())
        if bool((b.floor() * n).sum() <= budget * n.sum()):
            assert bool(((whole - b.floor()).abs() <= 1).all())


@pytest.mark.parametrize("options", [{"lowest": 1}, {"lowest": 5, "highest": 5}, {"highest": 9}, {"mode": "soft"}])
def test_ranges_and_modes_that_cannot_be(options: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="learnable bits need"):
        quantizer((4,), 3, **options)
    assert math.isclose(quantizer((8,), 3, highest=6).width.item(), 6), "starts within its range"
