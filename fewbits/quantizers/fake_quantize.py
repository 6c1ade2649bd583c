"""Fake quantization with a straight-through gradient, made to cost little time and no extra memory.

Forward is divide, round, clamp, multiply, in place on one buffer. Backward keeps only the input, which the
layer before has usually saved already; the quantized tensor that a convolution or matmul needs for its weight
gradient is computed again instead of stored (``recomputed``), so a quantized layer saves no more than a float one.
The gradient of the input then takes the memory of that tensor. All of it is bound by memory traffic, hence the
tiles: pieces of one long row that stay in the cache from one operation to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.quantizers.codes import Grid, cast
from fewbits.quantizers.ranges import on_host, quantize_rows
from fewbits.quantizers.recompute import Recomputable, recall

TILE = 1 << 17  # values: large enough to hide the cost of a call, small enough to stay in the cache of a CPU core
EDGE = 1e-6  # of the range: rounding must not clip the very value that has set the range

_clip_backward = torch.ops.aten.hardtanh_backward.grad_input  # grad where low < x < high, else 0


class FakeQuantize(Recomputable):
    """y = (round(x / s) clamped to the grid) * s, or 0 where pruned, with gradients to x, s and the zero point.

    Gradients: x by straight-through inside the clipping range (Bengio et al. 2013), also where pruned; s by LSQ (Esser
    et al. 2020, eq. 3); the zero point by LSQ+ (Bhalgat et al. 2020, eq. 6), rounded to an integer in forward.
    ``factor`` scales the gradients of s and of the zero point (LSQ, section 2.2). ``reach``: how far, in steps, the
    clipping range goes beyond the outermost codes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        pruned: Tensor | None,
        grid: Grid,
        factor: float,
        reach: float,
    ) -> Tensor:
        """x, pruned [G, m]; scale and zero [G, 1] in float32 (float64 for a float64 x)."""
        ctx.save_for_backward(x, scale, zero, pruned)
        y = _values(torch.empty_like(x), x, scale, zero, pruned, grid)
        ctx.grid, ctx.factor, ctx.reach, ctx.strides, ctx.again = grid, factor, reach, y.stride(), None
        return y

    @staticmethod
    def compute(ctx: Any, *saved: Any) -> Tensor:
        """Return the output of forward once more."""
        y = torch.empty_strided(saved[0].shape, ctx.strides, dtype=saved[0].dtype, device=saved[0].device)
        x, scale, zero, pruned = saved
        return _values(y, x, scale, zero, pruned, ctx.grid)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, scale, zero, pruned), y = recall(ctx)
        wants_x, *wants = ctx.needs_input_grad[:3]
        if y is None:
            y = torch.empty_like(x)
            if wants[0]:
                _values(y, x, scale, zero, pruned, ctx.grid)
        x = x if pruned is None else x.masked_fill(pruned, 0.0)
        edge = EDGE * (ctx.grid.highest - ctx.grid.lowest) + ctx.reach
        grad_x, steps, clipped = _gradients(grad, x, y, scale, zero, ctx.grid, edge, wants)
        return (
            grad_x if wants_x else None,
            None if steps is None else steps * (ctx.factor / scale),
            None if clipped is None else clipped * (scale * -ctx.factor),
            *(None,) * 4,
        )


def _values(y: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, pruned: Tensor | None, grid: Grid) -> Tensor:
    """Write the fake-quantized x to y, and return it."""
    for y_, x_ in zip(_tiles(y), _tiles(x)):
        if y.dtype == scale.dtype:
            quantize_rows(x_, scale, zero, grid, out=y_).mul_(scale)
        else:
            y_.copy_(cast(quantize_rows(x_, scale, zero, grid).mul_(scale), y.dtype))
    return y if pruned is None else y.masked_fill_(pruned, 0.0)


def _tiles(rows: Tensor) -> Sequence[Tensor]:
    """Cut a single long row on a CPU to tiles; return anything else as it is."""
    if len(rows) > 1 or rows.device.type != "cpu" or torch.compiler.is_compiling():
        return [rows]
    return torch.split(rows, TILE, dim=1)


def _gradients(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    grid: Grid,
    edge: float,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradient of x, in the memory of y, and as wanted s dL/ds and the sum of what was clipped, [G, 1]."""
    dtype = y.dtype
    grad, x, y = (t.to(scale.dtype) for t in (grad, x, y))  # half precision is too coarse for sums
    low, high = grid.lowest - edge, grid.highest + edge
    if on_host(scale):  # one row: move the bounds, which is cheaper than dividing x
        shift, step = 0.0 if zero is None else zero.item(), scale.item()
        sums = _row_gradients(grad, x, y, (low - shift) * step, (high - shift) * step, grid, wants)
        return y.to(dtype), *sums
    steps = torch.linalg.vecdot(grad, y)[:, None] if wants[0] else None
    scaled = x / scale if zero is None else (x / scale).add_(zero)
    _clip_backward(grad, scaled, low, high, grad_input=y)
    if steps is not None and not _is_sign(grid):
        steps -= torch.linalg.vecdot(y, x)[:, None]
    clipped = (grad.sum(1) - y.sum(1))[:, None] if wants[1] else None
    return y.to(dtype), steps, clipped


def _row_gradients(
    grad: Tensor, x: Tensor, y: Tensor, low: float, high: float, grid: Grid, wants: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Do the same for a single row on a CPU, tile by tile; overwrite y with the gradient of x."""
    steps = clipped = 0.0
    for grad_, x_, y_ in zip(*(torch.split(t, TILE) for t in (grad.reshape(-1), x.reshape(-1), y.view(-1)))):
        if wants[0]:
            steps += torch.dot(grad_, y_).item()
        _clip_backward(grad_, x_, low, high, grad_input=y_)
        if wants[0] and not _is_sign(grid):
            steps -= torch.dot(y_, x_).item()
        if wants[1]:
            clipped += (grad_.sum() - y_.sum()).item()
    return y.new_full((1, 1), steps) if wants[0] else None, y.new_full((1, 1), clipped) if wants[1] else None


def _is_sign(grid: Grid) -> bool:
    """Tell whether y = s * sign(x), whose derivative to s is sign(x) and has no term in x / s."""
    return grid.bits == 1 and grid.step == 2
