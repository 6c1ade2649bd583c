"""Dynamic quantizers: the statistics of each tensor anew, so there is nothing to calibrate and nothing to store.

One of them is a ``Rule``, pure functions of rows: how rows become codes with a scale and an offset, and what gradient
comes back. Everything else (granularity, dtypes, recomputation in backward, codes for packing) is here, once. Forward
is exactly ``values * scale + offset``, which is what ``Codes.decode`` computes.

Rows [..., m] are views of a tensor in the memory layout that it has. Where m is not the innermost axis (blocks of
channels of an image), statistics run over many rows at once, several times as fast as along short rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewbits.plan import TensorPlan
from fewbits.quantizers.base import Quantizer
from fewbits.quantizers.codes import Codes, Grid, cast
from fewbits.quantizers.grouping import Grouping
from fewbits.quantizers.ranges import TINY
from fewbits.quantizers.recompute import Recomputable, recall, remember

TILE = 1 << 18  # values: a dozen operations on each, so a call's cost weighs more than what falls out of the cache
# By bits, in mean magnitudes (0.798 standard deviations): Max 1960, "Quantizing for minimum distortion", table II
BEST_STEP = {1: 2.0, 2: 0.9957 / 0.7979, 3: 0.5860 / 0.7979, 4: 0.3352 / 0.7979}
HUGE = torch.finfo(torch.float32).max / 1.01  # finite also when rounded to bfloat16


class Fit(NamedTuple):
    """values [..., m]: codes as floats, in memory of their own. scale, offset: [..., 1]; symmetric grids have none."""

    values: Tensor
    scale: Tensor
    offset: Tensor | None


@dataclass(frozen=True)
class Rule:
    """How rows are quantized. Rows x, grad, pruned: [..., m], in float32 (float64 for float64 tensors)."""

    grid: Grid

    def fit(self, x: Tensor, pruned: Tensor | None) -> Fit:
        """Return the codes of x and what decodes them; never writes to x."""
        raise NotImplementedError

    def vjp(self, grad: Tensor, x: Tensor, pruned: Tensor | None) -> Tensor:
        """Return the gradient of x, given that of the fake-quantized x. Straight-through unless a rule says more."""
        return grad

    @property
    def straight_through(self) -> bool:
        """Tell whether ``vjp`` returns the gradient as it came."""
        return True


class DynamicQuantize(Recomputable):
    """y = values * scale + offset by a rule, with the rule's gradient. Saves only x (and where x is pruned)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pruned: Tensor | None, rule: Rule, grouping: Grouping) -> Tensor:
        """x, pruned of any shape; returns the shape and dtype of x."""
        ctx.save_for_backward(x, pruned)
        y = _values(x, pruned, rule, grouping)
        ctx.rule, ctx.grouping, ctx.strides, ctx.again = rule, grouping, y.stride(), None
        return y

    @staticmethod
    def compute(ctx: Any, *saved: Any) -> Tensor:
        """Return the output of forward once more."""
        x, pruned = saved
        y = _values(x, pruned, ctx.rule, ctx.grouping)
        if y.stride() == ctx.strides:
            return y
        return torch.empty_strided(y.shape, ctx.strides, dtype=y.dtype, device=y.device).copy_(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, pruned), _ = recall(ctx)
        return (grad if ctx.rule.straight_through else _vjp(grad, x, pruned, ctx.rule, ctx.grouping)), None, None, None


def _values(x: Tensor, pruned: Tensor | None, rule: Rule, grouping: Grouping) -> Tensor:
    """Return x fake-quantized, in its dtype."""
    x = grouping.viewable(x)
    y = torch.empty_like(x)
    for y_, x_, pruned_ in _tiles(grouping, y, x, pruned):
        values, scale, offset = rule.fit(wide(x_), pruned_)
        values = values.mul_(scale)
        y_.copy_(cast(values if offset is None else values.add_(offset), y.dtype))
    return y


def _vjp(grad: Tensor, x: Tensor, pruned: Tensor | None, rule: Rule, grouping: Grouping) -> Tensor:
    """Return the gradient of x, in its dtype."""
    x, grad = grouping.viewable(x), grouping.viewable(grad)
    out = torch.empty_like(x)
    for out_, grad_, x_, pruned_ in _tiles(grouping, out, grad, x, pruned):
        out_.copy_(rule.vjp(wide(grad_), wide(x_), pruned_))
    return out


def wide(x: Tensor) -> Tensor:
    """Return x in the dtype of statistics: float32, or float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _views(grouping: Grouping, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of the tensors, part by part; of None, None."""
    views = [None if t is None else grouping.views(grouping.viewable(t)) for t in tensors]
    for i in range(max(len(v) for v in views if v is not None)):
        yield tuple(None if v is None else v[i] for v in views)


def _tiles(grouping: Grouping, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Yield ``_views`` in pieces of whole rows that stay in the cache of a CPU core; elsewhere, uncut."""
    for part in _views(grouping, *tensors):
        if part[0].device.type == "cpu" and not torch.compiler.is_compiling():
            yield from _cut(part)
        else:
            yield part


def _cut(part: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Cut rows [..., m] along the first axis, and those that are too large still along the next."""
    first: Tensor = part[0]
    count = max(1, TILE * len(first) // first.numel())
    for start in range(0, len(first), count):
        piece: tuple[Any, ...] = tuple(None if t is None else t[start : start + count] for t in part)
        if piece[0].numel() > TILE and first.ndim > 2:  # a single one
            yield from _cut(tuple(None if t is None else t[0] for t in piece))
        else:
            yield piece


class Dynamic(Quantizer):
    """Base of the dynamic quantizers: a subclass builds its ``rule``."""

    dynamic = True
    has_offset = True
    can_prune = True

    def __init__(self, plan: TensorPlan, grouping: Grouping, groups: int, rule: Rule) -> None:
        super().__init__(plan, grouping, groups)
        self.rule = rule

    @property
    def grid(self) -> Grid:
        """The grid of the codes."""
        return self.rule.grid

    def calibrate(self, x: Tensor) -> None:
        """Check that x is finite; there is no range to keep. Raises QuantizationError on NaN or Inf."""
        self.require_finite(x)
        self.calibrated += 1

    def forward(self, x: Tensor) -> Tensor:
        """Return x fake-quantized, same shape and dtype, with the rule's gradient to x."""
        if not x.numel():
            return x
        y: Tensor = DynamicQuantize.apply(x, self.pruned(x), self.rule, self.grouping)
        remember(y, DynamicQuantize, y)
        return y

    def encode(self, x: Tensor) -> Codes:
        """Return the integer codes of x. Raises QuantizationError on NaN or Inf."""
        self.require_finite(x)
        with torch.no_grad():
            fits = [self.rule.fit(wide(p), mask) for p, mask in _views(self.grouping, x, self.pruned(x))]
            rows = [fit.values.to(torch.int32).flatten(0, -2) for fit in fits]
            values = self.grouping.merge(rows, x.shape)
            scale = torch.cat([fit.scale.flatten() for fit in fits])
            offsets = [fit.offset.flatten() for fit in fits if fit.offset is not None]
        offset = torch.cat(offsets) if offsets else None
        return Codes(values, scale, None, offset, self.grid, self.grouping, x.dtype, self.plan.pattern)


def spread(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Return (f, step, low): x as f * step + low with f [..., m] in 0..highest; min and max of a row are its ends.

    Denoising's and STE's affine f = (x - b) / s. A row of equal values has f = 0. Rows that span more than the largest
    float saturate.
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high / grid.highest - low / grid.highest).clamp_(TINY, HUGE / grid.highest)
    return (x - low).div_(step).clamp_(0.0, float(grid.highest)), step, low


def spread_around_mean(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Return (f, step, low) as ``spread``, for up to 4 bits: codes around the mean, in steps of k mean|x - mean x|.

    k is that of the least squared error of so many equal steps on a normal distribution (``BEST_STEP``). f is not held
    to the grid. A row of equal values has f in the middle, or near it, in steps of its own rounding error.
    """
    mean = (x / x.shape[-1]).sum(-1, keepdim=True)
    away = mean_magnitude((x - mean).clamp_(-HUGE, HUGE))
    step = torch.maximum(BEST_STEP[grid.bits] * away, mean.abs() * torch.finfo(x.dtype).eps * x.shape[-1])
    step = step.clamp_(TINY, HUGE / grid.highest)
    low = mean - step * (grid.highest / 2)
    return (x - low).clamp_(-HUGE, HUGE).div_(step), step, low


def to_grid(f: Tensor, grid: Grid) -> Tensor:
    """Return f rounded to the symmetric grid, in memory of its own; on a grid without a zero, 0 goes to +1."""
    if grid.bits == 1:
        return f.sign().add_(0.5).sign_()
    if grid.step == 2:
        return f.sub(1.0).div_(2.0).round_().mul_(2.0).add_(1.0).clamp_(grid.lowest, grid.highest)
    return f.round().clamp_(grid.lowest, grid.highest)


def largest(x: Tensor) -> Tensor:
    """Return max|x| of each row, [..., 1], at least TINY."""
    return torch.maximum(-x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)).clamp_(min=TINY)


def mean_magnitude(x: Tensor) -> Tensor:
    """Return mean|x| of each row, [..., 1], at least TINY."""
    return x.abs().div_(x.shape[-1]).sum(-1, keepdim=True).clamp_(TINY, HUGE)


def bounded(scale: Tensor, offset: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return scale and offset of 0..highest held to where every product and every sum is a finite number; scale > 0."""
    top = HUGE / grid.highest
    offset = offset.clamp(-HUGE, HUGE)
    return torch.minimum(scale.clamp(max=top), top - offset / grid.highest).clamp_(min=TINY), offset
