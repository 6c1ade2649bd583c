"""N2UQ: learned thresholds, uniform levels, the generalized straight-through gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbits.errors import PlanError
from fewbits.plan import TensorPlan
from fewbits.quantizers import N2UQ, make_quantizer


def n2uq(bits: int = 2, symmetric: bool = False) -> N2UQ:
    quantizer = make_quantizer(TensorPlan(bits, "n2uq", symmetric=symmetric))
    assert isinstance(quantizer, N2UQ)
    return quantizer


def test_it_starts_as_the_uniform_quantizer() -> None:
    x = torch.randn(500)
    for symmetric in (True, False):
        given = x if symmetric else x.abs()
        ours, uniform = n2uq(3, symmetric), make_quantizer(TensorPlan(3, "ste", symmetric=symmetric))
        ours.calibrate(given)
        uniform.calibrate(given)
        torch.testing.assert_close(ours(given), uniform(given))


def test_codes_change_at_the_thresholds_and_levels_stay_uniform() -> None:
    quantizer = n2uq()
    quantizer.calibrate(torch.tensor([3.0]))
    with torch.no_grad():
        quantizer.start.fill_(0.5)
        quantizer.widths.copy_(torch.tensor([1.0, 4.0, 2.0]))
        quantizer.scale.fill_(0.25)
    assert quantizer.thresholds().tolist() == [1.0, 3.5, 6.5]
    assert float(quantizer.step()) == pytest.approx(7 / 3)
    x = torch.tensor([-9.0, 0.99, 1.0, 3.4, 3.5, 6.4, 6.5, 99.0])
    assert (quantizer(x) / 0.25).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert quantizer.encode(x).values.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def expectation(x: Tensor, start: Tensor, widths: Tensor, scale: Tensor, lowest: int) -> Tensor:
    """E[y] under stochastic rounding: what backward differentiates."""
    edges = start + torch.cat([torch.zeros(1), widths.cumsum(0)[:-1]])
    return (((x[:, None] - edges) / widths).clamp(0, 1).sum(1) + lowest) * scale


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_gradient_is_that_of_the_expectation(symmetric: bool) -> None:
    quantizer = n2uq(3, symmetric)
    quantizer.calibrate(torch.randn(300) * 2)
    with torch.no_grad():
        quantizer.widths.mul_(torch.rand_like(quantizer.widths) + 0.5)
    x, grad = (3 * torch.randn(400)).requires_grad_(), torch.randn(400)
    quantizer(x).backward(grad)
    mirror = [t.detach().clone().requires_grad_() for t in (x, quantizer.start, quantizer.widths, quantizer.scale)]
    expectation(*mirror, lowest=quantizer.grid.lowest).backward(grad)
    factor = quantizer.gradient_factor(x)
    torch.testing.assert_close(x.grad, mirror[0].grad)
    torch.testing.assert_close(quantizer.start.grad, factor * mirror[1].grad, rtol=1e-4, atol=1e-5)  # type: ignore
    torch.testing.assert_close(quantizer.widths.grad, factor * mirror[2].grad, rtol=1e-4, atol=1e-5)  # type: ignore
    with torch.no_grad():
        steps = factor * (grad * quantizer(x) / quantizer.scale).sum().reshape(1)  # of the rounded output
    torch.testing.assert_close(quantizer.scale.grad, steps, rtol=1e-4, atol=1e-5)


def test_learned_thresholds_fit_a_skewed_tensor_better_than_uniform_ones_and_keep_the_law() -> None:
    x = torch.randn(2000).exp()
    target = x.clamp(max=6).sqrt()  # what follows wants small values told apart
    quantizer = n2uq(3)
    quantizer.calibrate(x.clamp(max=6))
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        loss = (quantizer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    widths = quantizer.segments()[1].detach()
    assert float(widths.max() / widths.min()) > 1.5
    assert torch.equal(quantizer.encode(x).decode(), quantizer(x))


def test_what_it_is_not_for() -> None:
    for plan in (TensorPlan(9 - 1, "n2uq", granularity="channel"), TensorPlan(16, "n2uq"), TensorPlan(1, "n2uq")):
        with pytest.raises(PlanError, match="quantizer 'n2uq'"):
            make_quantizer(plan, channels=4)
