"""The baselines, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewbits.errors import PlanError
from fewbits.plan import TensorPlan
from fewbits.quantizers import make_quantizer


def build(bits: int, quantizer: str, shape: tuple[int, ...], **fields: Any) -> Any:
    return make_quantizer(TensorPlan(bits, quantizer, **fields), shape=shape)


def test_dynamic_affine_spans_min_to_max() -> None:
    x = torch.tensor([[-1.0, 0.1, 0.6, 2.0]], requires_grad=True)
    y = build(2, "dynamic", (1, 4), symmetric=False)(x)
    torch.testing.assert_close(y, torch.tensor([[-1.0, 0.0, 1.0, 2.0]]))
    u = torch.randn(1, 4)
    assert torch.equal(torch.autograd.grad(y, x, u)[0], u)


def test_dynamic_linear_is_the_mean_or_the_largest_magnitude() -> None:
    x = torch.tensor([[-1.0, 0.5, 2.5, -4.0]])
    assert build(1, "dynamic", (1, 4))(x).tolist() == [[-2.0, 2.0, 2.0, -2.0]]
    assert build(2, "dynamic", (1, 4))(x).tolist() == [[0.0, 0.0, 4.0, -4.0]]
    q = build(8, "dynamic", (1, 4))
    assert q.encode(x).values.tolist() == [[-32, 16, 79, -127]]
    assert build(1, "dynamic", (1, 4), sparsity="2:4")(x).tolist() == [[0.0, 0.0, 3.25, -3.25]]


def test_bitnet() -> None:
    x = torch.tensor([[1.0, 3.0], [5.0, -1.0]], requires_grad=True)  # mean 2, mean magnitude 2.5
    y = build(1, "bitnet", (2, 2))(x)
    assert y.tolist() == [[-2.5, 2.5], [2.5, -2.5]]
    u = torch.randn(2, 2)
    assert torch.equal(torch.autograd.grad(y, x, u)[0], u)
    assert build(2, "bitnet", (2, 2))(x).tolist() == [[0.0, 2.5], [2.5, 0.0]]
    for fields in ({"bits": 3}, {"bits": 1, "symmetric": False}):
        with pytest.raises(PlanError, match="activations use 'dynamic'"):
            build(quantizer="bitnet", shape=(2, 2), **fields)


def test_paretoq() -> None:
    x = torch.tensor([[0.5, -1.5, 3.0, -1.0], [1.0, 1.0, 1.0, -1.0]], dtype=torch.float64)
    q = build(1, "paretoq", (2, 4), granularity="channel").double()
    q.calibrate(x)
    torch.testing.assert_close(q.scale.detach(), torch.tensor([1.5, 1.0], dtype=torch.float64))  # mean magnitude
    with torch.no_grad():
        q.scale[0] = 1.4
    x.requires_grad_()
    u = torch.randn(2, 4, dtype=torch.float64)
    y = q(x)
    assert torch.equal(y, x.sign() * q.scale[:, None])
    got_x, got_scale = torch.autograd.grad(y, [x, q.scale], u)
    assert torch.equal(got_x, u * (x.abs() <= q.scale[:, None]))
    torch.testing.assert_close(got_scale, (u * x.sign()).sum(1) * 8**-0.5)
    with pytest.raises(PlanError, match="for more bits use 'lsq'"):
        build(2, "paretoq", (2, 4))
