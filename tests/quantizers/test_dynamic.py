"""What dynamic quantizers share: nothing to calibrate, nothing to store, and nothing more kept for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewbits.layers import calibrate, quantize
from fewbits.plan import LayerPlan, Plan, TensorPlan
from fewbits.quantizers import Quantizer, dynamic, make_quantizer, recomputed
from tests.quantizers.test_fake_quantize import block, gradients, run, saved_bytes

PLANS = {
    "denoise affine": TensorPlan(2, "denoise", symmetric=False, granularity="block", block=4),
    "denoise linear": TensorPlan(2, "denoise", granularity="block", block=4),
    "denoise sparse": TensorPlan(1, "denoise", granularity="block", block=4, sparsity="2:4"),
    "gain": TensorPlan(2, "denoise", symmetric=False, granularity="block", block=4, options={"gradient": "gain"}),
    "dynamic affine": TensorPlan(2, "dynamic", symmetric=False, granularity="channel"),
    "dynamic linear": TensorPlan(2, "dynamic"),
}
ACTIVATION = TensorPlan(4, "denoise", symmetric=False, granularity="block", block=4)


def pair(name: str) -> tuple[Quantizer, Quantizer, Tensor, Tensor]:
    x, w = torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(5, 8, 3, 3, requires_grad=True)
    qx = make_quantizer(ACTIVATION, channels=8, axis=-3, contraction=-3)
    return qx, make_quantizer(PLANS[name], shape=tuple(w.shape)), x, w


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_recomputing_changes_no_gradient(name: str, memory_format: torch.memory_format) -> None:
    qx, qw, x, w = pair(name)
    x = x.detach().to(memory_format=memory_format).requires_grad_()
    w = w.detach().to(memory_format=memory_format).requires_grad_()
    y, plain = run(F.conv2d, qx, qw, x, w), F.conv2d(qx(x), qw(w))
    assert torch.equal(y, plain)
    grad = torch.randn_like(y)
    first = torch.autograd.grad(y, [x, w], grad, retain_graph=True)
    for got, want in zip(first, gradients(plain, grad, x, w)):
        assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y, [x, w], grad)))


@pytest.mark.parametrize("name", PLANS)
def test_hooks_that_move_what_is_saved(name: str) -> None:
    qx, qw, x, w = pair(name)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    wanted = torch.autograd.grad(F.conv2d(qx(x), qw(w)).square().sum(), [x, w])
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.detach().clone(memory_format=torch.contiguous_format), lambda t: t
    ):
        y = run(F.conv2d, qx, qw, x, w).square().sum()
    torch.testing.assert_close(torch.autograd.grad(y, [x, w]), wanted)


def test_changing_the_input_in_place_raises() -> None:
    qx, qw, leaf, w = pair("denoise affine")
    x = leaf * 1
    y = run(F.conv2d, qx, qw, x, w)
    torch.autograd.grad(y.sum(), w, retain_graph=True)  # recomputes x, but has no use for its gradient
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["denoise affine", "denoise linear", "dynamic affine"])
def test_a_quantized_block_saves_no_more_than_a_float_one(name: str) -> None:
    x = torch.randn(16, 8, 16, 16)
    plain, quantized = block(), block()
    plan = LayerPlan(PLANS[name], ACTIVATION)
    quantize(quantized, Plan(tuple((str(i), plan) for i in (0, 3, 6))), verbose=False)
    calibrate(quantized, [x])
    wanted = saved_bytes(lambda: plain(x), [x, *plain.parameters()])
    assert saved_bytes(lambda: quantized(x), [x, *quantized.parameters(), *quantized.buffers()]) <= 1.05 * wanted


@pytest.mark.parametrize("name", PLANS)
def test_one_graph_when_compiled(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    quantize(model, Plan((("*", LayerPlan(PLANS[name], ACTIVATION)),)), verbose=False)
    calibrate(model, [x])
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum()
    torch.testing.assert_close(torch.autograd.grad(got, list(model.parameters())), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PLANS)
def test_tiles_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, u = torch.randn(5, 8, 3, 3, requires_grad=True), torch.randn(5, 8, 3, 3)
    q = make_quantizer(PLANS[name], shape=(5, 8, 3, 3))
    y = q(x)
    (grad,) = torch.autograd.grad(y, x, u)
    monkeypatch.setattr(dynamic, "TILE", 1)  # a row each
    assert torch.equal(q(x), y)
    assert torch.equal(torch.autograd.grad(q(x), x, u)[0], grad)


@pytest.mark.parametrize("name", PLANS)
def test_nothing_to_calibrate_and_nothing_to_store(name: str) -> None:
    q = make_quantizer(PLANS[name], shape=(6, 8)).eval()
    x = torch.randn(6, 8)
    assert not q.calibrated and torch.equal(q.encode(x).decode(), q(x))
    before = q(x)
    q.calibrate(100 * torch.randn(6, 8))
    assert torch.equal(q(x), before) and q.calibrated == 1
    assert not list(q.parameters()) and not list(q.buffers())
    assert q(torch.empty(0, 8)).shape == (0, 8)


def test_each_tensor_has_its_own_shape_and_range() -> None:
    q = make_quantizer(ACTIVATION, channels=8, axis=-1, contraction=-1)
    for shape in ((3, 8), (2, 5, 8), (8,)):
        x = torch.randn(shape)
        assert torch.equal(q(2 * x), 2 * q(x)) and torch.equal(q.encode(x).decode(), q(x))


def test_a_model_needs_no_calibration() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    quantize(model, Plan((("*", LayerPlan(PLANS["denoise affine"], ACTIVATION)),)), verbose=False)
    assert model.eval()(torch.randn(3, 8)).shape == (3, 4)


def test_no_gradient_for_what_asks_for_none() -> None:
    qx, qw, x, w = pair("denoise affine")
    with recomputed(qx(x.detach()), qw(w)):
        assert not qx(x.detach()).requires_grad
    with torch.no_grad():
        assert not qw(w).requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    qx, qw, x, w = pair("denoise sparse")

    def part(x: Tensor) -> Tensor:
        return run(F.conv2d, qx, qw, x, w).relu()

    wanted = torch.autograd.grad(part(x).square().sum(), [x, w])
    checkpoint(part, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(leaf.grad, want) for leaf, want in zip((x, w), wanted))  # type: ignore[arg-type]
