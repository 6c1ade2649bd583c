"""The quantizer that a fusion is folded into."""

from __future__ import annotations

import pytest
import torch

from fewbits.errors import PlanError, QuantizationError
from fewbits.plan import TensorPlan
from fewbits.quantizers import Requantize, Uniform, make_quantizer
from fewbits.quantizers.requantize import whole_steps

GAINS, SIGMA, MU = torch.tensor([0.3, 0.3, 0.7]), torch.tensor(0.61), torch.tensor(0.44)


def folded(bits: int, symmetric: bool) -> tuple[Uniform, Requantize]:
    old = make_quantizer(TensorPlan(bits, "lsq", symmetric=symmetric))
    old.calibrate(torch.randn(1000))
    new = make_quantizer(TensorPlan(bits, "requantize", symmetric=symmetric), channels=3, axis=-3)
    assert isinstance(old, Uniform) and isinstance(new, Requantize)
    new.take_over(old, GAINS, SIGMA, MU)
    return old, new


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_quantizes_what_the_affine_map_and_the_old_one_do(bits: int, symmetric: bool) -> None:
    old, new = folded(bits, symmetric)
    x = torch.randn(4, 3, 9, 9).relu()
    scale, _ = old.affine()
    snapped = whole_steps(MU, SIGMA, scale) * scale * SIGMA
    assert abs(float(snapped - MU)) <= float(scale * SIGMA) / 2 + 1e-6
    want = old((x * GAINS[:, None, None] - snapped) / SIGMA)
    assert torch.equal(new(x), want)
    assert torch.equal(new.encode(x).decode(), new(x))
    assert new.affine()[0] == scale  # the unit of what the layer multiplies


def test_gradient_is_straight_through_times_the_gain() -> None:
    old, new = folded(4, True)
    x = torch.randn(4, 3, 9, 9, requires_grad=True)
    new(x).sum().backward()
    scaled = (x.detach() * GAINS[:, None, None] / SIGMA) / old.affine()[0].detach() - float(new.shift)
    inside = (scaled >= new.bounds()[0]) & (scaled <= new.bounds()[1])
    assert 0 < inside.float().mean() < 1
    torch.testing.assert_close(x.grad, inside * (GAINS[:, None, None] / SIGMA))


def test_state_comes_back_whatever_the_number_of_channels() -> None:
    _, new = folded(4, False)
    other = make_quantizer(new.plan, channels=3, axis=-3)
    other.load_state_dict(new.state_dict())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(other(x), new(x))


def test_its_range_is_settled() -> None:
    _, new = folded(4, True)
    for change in (lambda: new.calibrate(torch.randn(2, 3)), new.reset):
        with pytest.raises(QuantizationError, match="a fusion was folded into this quantizer"):
            change()
    with pytest.raises(PlanError, match="no odd grid"):
        make_quantizer(TensorPlan(1, "requantize"))
