"""PACT: gradients of the paper, signed and unsigned, and the law (test_uniform draws it, too)."""

from __future__ import annotations

import warnings

import pytest
import torch

from fewbits.errors import PlanError
from fewbits.plan import TensorPlan
from fewbits.quantizers import PACT, Quantizer, make_quantizer


def pact(bits: int = 4, *, symmetric: bool = False, clip: float = 1.5) -> PACT:
    quantizer = make_quantizer(TensorPlan(bits, "pact", symmetric=symmetric))
    assert isinstance(quantizer, PACT)
    with torch.no_grad():
        quantizer.clip.fill_(clip)
    quantizer.calibrated = 1
    return quantizer


def test_levels_are_uniform_from_zero_to_the_clip() -> None:
    y = pact(2)(torch.tensor([-1.0, 0.0, 0.2, 0.3, 1.2, 1.4, 9.0]))
    assert y.tolist() == pytest.approx([0, 0, 0, 0.5, 1.0, 1.5, 1.5])


def test_signed_inputs_are_clipped_on_both_sides() -> None:
    y = pact(3, symmetric=True)(torch.tensor([-9.0, -0.6, 0.0, 0.6, 9.0]))
    assert y.tolist() == pytest.approx([-1.5, -0.5, 0, 0.5, 1.5])


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_gradient_of_the_clip_is_the_sum_of_what_was_clipped(symmetric: bool) -> None:
    x = (torch.randn(1000) * 2).requires_grad_()
    quantizer, grad = pact(symmetric=symmetric), torch.randn(1000)
    quantizer(x).backward(grad)
    above, below = x > 1.5, x < (-1.5 if symmetric else 0.0)
    assert torch.equal(x.grad, grad.masked_fill(above | below, 0.0))  # type: ignore[arg-type]
    expected = grad[above].sum() - (grad[below].sum() if symmetric else 0.0)
    torch.testing.assert_close(quantizer.clip.grad, expected.reshape(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_law_after_training(symmetric: bool) -> None:
    quantizer: Quantizer = make_quantizer(TensorPlan(3, "pact", symmetric=symmetric))
    x = torch.randn(64).abs() if not symmetric else torch.randn(64)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.5)
    first = None
    for _ in range(40):
        loss = (quantizer(x) - x).square().mean()
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(quantizer.encode(x).decode(), quantizer(x))
    assert [n for n, _ in quantizer.named_parameters()] == ["clip"]


def test_an_unsigned_clip_warns_of_signed_inputs_and_names_the_layer() -> None:
    quantizer = make_quantizer(TensorPlan(4, "pact", symmetric=False))
    quantizer.label = "input of layer 'c': "
    with pytest.warns(UserWarning, match=r"input of layer 'c': values down to .*use symmetric=True"):
        quantizer.calibrate(torch.randn(100))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer.calibrate(torch.nn.functional.silu(6 * torch.randn(100)))


def test_what_it_is_not_for() -> None:
    with pytest.raises(PlanError, match="no odd grid"):
        make_quantizer(TensorPlan(1, "pact"))
    with pytest.raises(PlanError, match="no sparse form"):
        make_quantizer(TensorPlan(4, "pact", sparsity="2:4"), shape=(8, 8))
