"""Gradients against plain autograd in float64, and what a quantized layer keeps for backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewbits.layers import calibrate, quantize
from fewbits.plan import LayerPlan, Plan, TensorPlan
from fewbits.quantizers import Quantizer, fake_quantize, make_quantizer, ranges, recomputed

TILE = 1 << 14  # a smaller one, so that the tests stay quick
LONG = (3, 2, TILE // 4 + 37)  # more than one tile, and not a whole number of them
KINDS = {
    "tensor": ({"symmetric": False}, LONG, 0),
    "symmetric tensor": ({}, LONG, 0),
    "channel": ({"granularity": "channel"}, (5, 3, 7), 0),
    "channel of an activation": ({"granularity": "channel", "symmetric": False}, (4, 5, 6), 1),
    "block with a rest": ({"granularity": "block", "block": 4}, (3, 10), 0),
    "affine block": ({"granularity": "block", "block": 4, "symmetric": False}, (3, 8), 0),
    "odd": ({"granularity": "channel", "options": {"odd": True}}, (5, 21), 0),
    "odd tensor": ({"options": {"odd": True}}, LONG, 0),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_quantize, "TILE", TILE)


AFFINE = [name for name, (options, *_) in KINDS.items() if not options.get("symmetric", True)]


def make(name: str, bits: int, quantizer: str, x: Tensor) -> Quantizer:
    """Return a quantizer whose range clips some of x, and whose learned values sit between integers."""
    options, _, axis = KINDS[name]
    made = make_quantizer(TensorPlan(bits, quantizer, **options), shape=tuple(x.shape), axis=axis)
    made.to(torch.float64 if x.dtype == torch.float64 else torch.float32).calibrate(x.detach())
    with torch.no_grad():
        made.scale.mul_(0.61)
        if quantizer == "lsq+":
            made.zero_point.add_(0.3)
    return made


def reference(x: Tensor, q: Any, scale: Tensor, zero: Tensor | None) -> Tensor:
    """LSQ and LSQ+ as the papers write them, on plain autograd."""
    grid, g = q.grid, (x.numel() / q.groups * q.grid.highest) ** -0.5
    parts = q.grouping.rows(x)
    s = scale * g + (scale - scale * g).detach()  # the value of scale, g times its gradient
    steps = q.grouping.split(s, parts)
    if zero is None:
        shifts = [torch.zeros_like(step) for step in steps]
    else:
        z = zero * g + (zero.round().clamp(grid.lowest, grid.highest) - zero * g).detach()
        shifts = q.grouping.split(z, parts)
    made = []
    for part, step, shift in zip(parts, steps, shifts):
        reach = 1 if grid.step == 2 else 0
        clipped = torch.minimum(torch.maximum(part / step, grid.lowest - reach - shift), grid.highest + reach - shift)
        whole = ((clipped - reach) / grid.step).round() * grid.step + reach
        whole = torch.minimum(torch.maximum(whole, grid.lowest - shift), grid.highest - shift).detach()
        if grid.bits == 1 and grid.step == 2:  # y = s * sign(x), straight through to x inside
            made.append(whole * step + (clipped - clipped.detach()) * step.detach() - _only_step(part, step, grid))
        else:
            made.append((clipped + (whole - clipped).detach()) * step)
    return q.grouping.merge(made, x.shape)


def _only_step(part: Tensor, step: Tensor, grid: Any) -> Tensor:
    """Zero, with the gradient that clipping x / s has to s."""
    clipped = torch.clamp(part.detach() / step, grid.lowest - 1, grid.highest + 1)
    return (clipped - clipped.detach()) * step.detach()


def gradients(y: Tensor, grad: Tensor, *leaves: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], grad))


def pair(name: str, bits: int, quantizer: str, dtype: torch.dtype) -> tuple[Any, Tensor, Tensor, list[Tensor]]:
    """Return a quantizer, its input and output gradient, and the reference gradients in float64."""
    torch.manual_seed(bits)
    x = (torch.randn(KINDS[name][1]) + 0.2).to(dtype).requires_grad_()
    grad = torch.randn(x.shape).to(dtype)
    q: Any = make(name, bits, quantizer, x)
    exact = x.detach().double().requires_grad_()
    scale = q.scale.detach().double().requires_grad_()
    zero = None if q.zero_point is None else q.zero_point.detach().double().requires_grad_()
    wanted = gradients(
        reference(exact, q, scale, zero), grad.double(), exact, scale, zero if quantizer == "lsq+" else None
    )
    return q, x, grad, wanted


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("name", "quantizer"), [*((n, "lsq") for n in KINDS), *((n, "lsq+") for n in AFFINE)])
def test_gradients_are_those_of_the_papers(name: str, bits: int, quantizer: str) -> None:
    q, x, grad, wanted = pair(name, bits, quantizer, torch.float64)
    got = gradients(q(x), grad, x, q.scale, q.zero_point if quantizer == "lsq+" else None)
    assert 0 < (wanted[0] == 0).double().mean() < 1  # some values are clipped, and some are not
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_where_no_number_can_be_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator runs gives what a CPU gives."""
    affine = name in AFFINE
    q, x, grad, wanted = pair(name, 4, "lsq+" if affine else "lsq", torch.float64)
    y = q(x)
    for module in (fake_quantize, ranges):
        monkeypatch.setattr(module, "on_host", lambda value: False)
    monkeypatch.setattr(fake_quantize, "TILE", x.numel())
    assert torch.equal(q(x), y)
    got = gradients(q(x), grad, x, q.scale, q.zero_point if affine else None)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize(("name", "quantizer"), [*((n, "lsq") for n in KINDS), *((n, "lsq+") for n in AFFINE)])
def test_a_scale_that_ran_away_leaves_finite_gradients(name: str, quantizer: str, bits: int) -> None:
    x = torch.randn(KINDS[name][1]).requires_grad_()
    q: Any = make(name, bits, quantizer, x)
    with torch.no_grad():
        q.scale.fill_(3e38)
    y = q(x)
    found = gradients(y, torch.ones_like(y), x, q.scale, q.zero_point if quantizer == "lsq+" else None)
    assert all(bool(torch.isfinite(t).all()) for t in (y, *found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tensor", "channel", "odd tensor"])
def test_gradients_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    q, x, grad, wanted = pair(name, 4, "lsq", dtype)
    y = q(x)
    got_x, got_scale = gradients(y, grad, x, q.scale)
    assert got_x.dtype == dtype
    assert (got_x.double() != wanted[0]).double().mean() < 1e-4  # but for values on the very edge of the range
    parts = q.grouping.rows((grad * y).detach().double())  # y is rounded to dtype, at random
    factor = (x.numel() / q.groups * q.grid.highest) ** -0.5
    rounding = torch.cat([part.norm(dim=1) for part in parts]) * torch.finfo(dtype).eps
    summing = torch.cat([part.abs().sum(1) for part in parts]) * torch.finfo(torch.float32).eps  # in any order
    assert ((got_scale - wanted[1]).abs() < (4 * rounding + summing) * factor / q.scale.detach()).all()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_the_values_that_set_the_range_pass_gradient(bits: int, granularity: str) -> None:
    for seed in range(20):
        x = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        q = make_quantizer(TensorPlan(bits, granularity=granularity, range="minmax"), shape=(4, 9))
        assert gradients(q(x), torch.ones(4, 9), x)[0].min() == 1


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x, grad = torch.randn(4, 6), torch.ones(4, 6)
    q: Any = make_quantizer(TensorPlan(4, "lsq+", symmetric=False), shape=(4, 6))
    both = gradients(q(x), grad, q.scale, q.zero_point)
    alone = gradients(q(x.requires_grad_()), grad, x, q.scale, q.zero_point)
    assert all(torch.equal(a, b) for a, b in zip(both, alone[1:]))
    q.scale.requires_grad_(False)
    assert all(torch.equal(a, b) for a, b in zip(gradients(q(x), grad, x, q.zero_point), (alone[0], alone[2])))
    q.zero_point.requires_grad_(False)
    assert torch.equal(gradients(q(x), grad, x)[0], alone[0])
    assert not q(x.detach()).requires_grad


@pytest.mark.parametrize("name", KINDS)
def test_a_gradient_that_is_one_number_everywhere(name: str) -> None:
    q, x, _, _ = pair(name, 4, "lsq", torch.float64)
    got = gradients(q(x).sum(), torch.ones(()).double(), x, q.scale)
    torch.testing.assert_close(got, gradients(q(x), torch.ones_like(x), x, q.scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS)
def test_tiles_agree_with_codes(name: str, dtype: torch.dtype) -> None:
    whole = torch.randn((2, *KINDS[name][1]), generator=torch.Generator().manual_seed(1)).to(dtype).movedim(0, -1)
    x = whole[..., 0]  # not contiguous
    q = make(name, 4, "lsq", x)
    assert torch.equal(q.encode(x).decode(), q(x))
    assert torch.equal(q(x), q(x.contiguous()))


def op_conv(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, padding=1)


def op_linear(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x.flatten(2), w.flatten(1)[:, :36])


def op_twice(x: Tensor, w: Tensor) -> Tensor:
    return op_conv(x, w) * op_conv(x, w).sigmoid() + x[:, :1].square()


def layer(quantizer: str = "lsq") -> tuple[Any, Any, Tensor, Tensor]:
    torch.manual_seed(0)
    x, w = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(5, 4, 3, 3, requires_grad=True)
    qx = make_quantizer(TensorPlan(4, quantizer, symmetric=False), channels=4, axis=1)
    qw = make_quantizer(TensorPlan(4, quantizer, granularity="channel"), shape=tuple(w.shape))
    return qx, qw, x, w


def run(op: Callable[[Tensor, Tensor], Tensor], qx: Quantizer, qw: Quantizer, x: Tensor, w: Tensor) -> Tensor:
    a, b = qx(x), qw(w)
    with recomputed(a, b):
        return op(a, b)


def learned(*modules: nn.Module) -> list[Tensor]:
    return [p for m in modules for p in m.parameters()]


@pytest.mark.parametrize("quantizer", ["ste", "lsq", "lsq+"])
@pytest.mark.parametrize("op", [op_conv, op_linear, op_twice])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_recomputing_changes_no_gradient(op: Any, quantizer: str, memory_format: torch.memory_format) -> None:
    qx, qw, x, w = layer("lsq" if quantizer == "lsq+" else quantizer)
    if quantizer == "lsq+":
        qx = make_quantizer(TensorPlan(4, "lsq+", symmetric=False), channels=4, axis=1)
    if op is op_linear:
        w = w.detach().repeat(1, 1, 1, 2).requires_grad_()
        qw = make_quantizer(TensorPlan(4, quantizer.rstrip("+"), granularity="channel"), shape=tuple(w.shape))
    x = x.detach().to(memory_format=memory_format).requires_grad_()
    leaves = [x, w, *learned(qx, qw)]
    y = run(op, qx, qw, x, w)
    plain = op(qx(x), qw(w))
    assert torch.equal(y, plain)
    grad = torch.randn_like(y)
    for got, want in zip(gradients(y, grad, *leaves), gradients(plain, grad, *leaves)):
        assert torch.equal(got, want)


def test_a_second_backward() -> None:
    qx, qw, x, w = layer()
    leaves = [x, w, *learned(qx, qw)]
    y = run(op_conv, qx, qw, x, w)
    grad = torch.randn_like(y)
    first = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(y, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves, grad)


def test_changing_the_input_in_place_raises() -> None:
    qx, qw, leaf, w = layer()
    x = leaf * 1
    y = run(op_conv, qx, qw, x, w)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_changing_the_input_in_place_after_a_partial_backward_raises() -> None:
    qx, qw, leaf, w = layer()
    x = leaf * 1
    y = run(op_conv, qx, qw, x, w)
    torch.autograd.grad(y.sum(), w, retain_graph=True)  # recomputes x, but has no use for its gradient
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    qx, qw, x, w = layer()
    leaves = [x, w, *learned(qx, qw)]

    def block(x: Tensor) -> Tensor:
        return run(op_conv, qx, qw, x, w).relu()

    wanted = torch.autograd.grad(block(x).square().sum(), leaves)
    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(leaf.grad, want) for leaf, want in zip(leaves, wanted))  # type: ignore[arg-type]


def test_hooks_that_move_what_is_saved() -> None:
    """Saving on another device gives contiguous tensors back, whatever their layout was."""
    x, w = torch.randn(7, 6, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    qx = make_quantizer(TensorPlan(4, "lsq", symmetric=False), channels=6, axis=1)
    qw = make_quantizer(TensorPlan(4, "lsq", granularity="channel"), shape=(6, 5), axis=1, contraction=0)
    leaves = [x, w, *learned(qx, qw)]
    wanted = torch.autograd.grad((qx(x) @ qw(w)).square().sum(), leaves)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.detach().clone(memory_format=torch.contiguous_format), lambda t: t
    ):
        y = run(torch.matmul, qx, qw, x, w).square().sum()
    torch.testing.assert_close(torch.autograd.grad(y, leaves), wanted)


def saved_bytes(forward: Callable[[], Tensor], owned: Sequence[Tensor]) -> int:
    """Return the size of the storages that the graph of forward() keeps, without those that it does not own."""
    known = {t.untyped_storage().data_ptr() for t in owned}
    storages: dict[int, int] = {}
    held = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            held.append(t)  # so that no later tensor takes its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held.append(forward())
    return sum(storages.values())


def block() -> nn.Sequential:
    parts = [(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(*(layer for part in parts for layer in part))


@pytest.mark.parametrize("quantizer", ["ste", "lsq", "lsq+"])
def test_a_quantized_block_saves_no_more_than_a_float_one(quantizer: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8, 16, 16)
    plain, quantized = block(), block()
    weight = quantizer.rstrip("+")
    plan = LayerPlan(TensorPlan(4, weight, granularity="channel"), TensorPlan(4, quantizer, symmetric=False))
    quantize(quantized, Plan(tuple((str(i), plan) for i in (0, 3, 6))), verbose=False)
    calibrate(quantized, [x])
    wanted = saved_bytes(lambda: plain(x), [x, *plain.parameters()])
    assert saved_bytes(lambda: quantized(x), [x, *quantized.parameters(), *quantized.buffers()]) <= 1.05 * wanted


def test_a_quantized_linear_saves_no_weight() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 40, requires_grad=True)
    model = nn.Sequential(nn.Linear(40, 50))
    plan = LayerPlan(TensorPlan(4, "lsq", granularity="channel"), TensorPlan(4, "lsq", symmetric=False))
    quantize(model, Plan((("0", plan),)), verbose=False)
    calibrate(model, [x])
    assert saved_bytes(lambda: model(x), [x, *model.parameters(), *model.buffers()]) < 50 * 40 * 4 / 4


def test_one_graph_when_compiled() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    plan = LayerPlan(TensorPlan(4, "lsq", granularity="channel"), TensorPlan(4, "lsq+", symmetric=False))
    quantize(model, Plan((("0", plan), ("2", plan))), verbose=False)
    calibrate(model, [x])
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum()
    torch.testing.assert_close(torch.autograd.grad(got, list(model.parameters())), wanted, rtol=1e-4, atol=1e-4)
