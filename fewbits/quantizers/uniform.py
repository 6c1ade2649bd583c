"""Uniform quantizers: fixed range with a straight-through gradient (``ste``), and learned step (``lsq``, ``lsq+``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import PlanError
from fewbits.plan import TensorPlan
from fewbits.quantizers.base import Quantizer, register_quantizer
from fewbits.quantizers.codes import Codes, make_grid
from fewbits.quantizers.fake_quantize import FakeQuantize
from fewbits.quantizers.grouping import Grouping
from fewbits.quantizers.ranges import TINY, find_range, from_bounds, largest_scale, quantize_rows
from fewbits.quantizers.recompute import remember
from fewbits.quantizers.sparsity import kept_values


@register_quantizer("ste")
class Uniform(Quantizer):
    """Uniform grid, symmetric or affine, whose range is set by calibration and then stays.

    Options: narrow (leave out the lowest code; default at 8 bits, where it keeps weights mirrored), odd (mid-rise
    grid without a zero; always at one symmetric bit), percentile (of the range ``percentile``; default 99.9).
    """

    learns_scale = False
    learns_zero_point = False
    can_prune = True
    scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self,
        plan: TensorPlan,
        grouping: Grouping,
        groups: int,
        *,
        narrow: bool | None = None,
        odd: bool = False,
        percentile: float | None = None,
    ) -> None:
        super().__init__(plan, grouping, groups)
        if percentile is not None and plan.range != "percentile":
            raise PlanError(f"percentile={percentile} with range={plan.range!r}: drop it, or use range='percentile'")
        percentile = 99.9 if percentile is None else percentile
        if not 50 < percentile <= 100:
            raise PlanError(f"percentile must be above 50 and at most 100, got {percentile}")
        if odd and not plan.symmetric:
            raise PlanError("an odd grid has no zero point: use symmetric=True with odd=True")
        if narrow is not None and (odd or not plan.symmetric):
            raise PlanError(f"narrow={narrow} is for even symmetric grids: drop it, or use symmetric=True, odd=False")
        narrow = plan.bits == 8 if narrow is None else narrow
        self.grid = make_grid(plan.bits, symmetric=plan.symmetric, narrow=narrow, odd=odd)
        self.percentile = percentile
        self._bounds: Tensor | None = None  # [2, G], lower and upper end of the range so far, before rounding
        self._hold("scale", torch.ones(groups), self.learns_scale)
        zero = None if plan.symmetric else torch.zeros(groups)
        self._hold("zero_point", zero, self.learns_zero_point)

    @classmethod
    def weight_options(cls, bits: int) -> dict[str, Any]:
        """Two-bit weights train better on {-3, -1, 1, 3} than on {-2, -1, 0, 1} (docs/results/foundation.md)."""
        return {"odd": True} if bits == 2 else {}

    def _hold(self, name: str, value: Tensor | None, learned: bool) -> None:
        if learned and value is not None:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def calibrate(self, x: Tensor) -> None:
        """Set scale and zero point from x; over several calls the range is the widest (minmax) or the mean one.

        A tensor without elements (no proposals in a detector) tells nothing of the range, and leaves it as it is.
        """
        self.require_finite(x)
        if not x.numel():
            return
        parts = self.grouping.rows(x)
        if (pruned := self.pruned(x)) is not None:
            parts = [kept_values(p, mask) for p, mask in zip(parts, self.grouping.rows(pruned))]
        found = [
            find_range(p, self.grid, symmetric=self.plan.symmetric, method=self.plan.range, percentile=self.percentile)
            for p in parts
        ]
        scale = torch.cat([s for s, _ in found]).to(self.scale)
        zero = torch.cat([z for _, z in found]).to(self.scale)
        self.grouping.split(self.scale, parts)  # raises where the shape does not fit
        with torch.no_grad():
            self._merge(scale, zero)
        self.calibrated += 1

    def _merge(self, scale: Tensor, zero: Tensor) -> None:
        n, bounds = self.calibrated, self._span(scale, zero)
        if n:
            old = self._span(*self.affine()) if self._bounds is None else self._bounds.to(bounds)
            if self.plan.range == "minmax":
                low, high = torch.minimum(old, bounds)[0], torch.maximum(old, bounds)[1]
            else:
                low, high = old + (bounds - old) / (n + 1)
            bounds = torch.stack([low, high])
            scale, zero = from_bounds(low, high, self.grid, self.plan.symmetric)
        self._bounds = bounds
        self._set_scale(scale)
        if self.zero_point is not None:
            self.zero_point.copy_(zero)

    def _set_scale(self, scale: Tensor) -> None:
        self.scale.copy_(scale)

    def _span(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the values of the lowest and the highest code, [2, G]."""
        shift = torch.zeros_like(scale) if zero is None else zero
        return torch.stack([self.grid.lowest - shift, self.grid.highest - shift]) * scale

    def reset(self) -> None:
        """Forget the range, so that the next tensor sets it."""
        super().reset()
        self._bounds = None

    def set_extra_state(self, state: Mapping[str, int]) -> None:
        """Undo ``get_extra_state``; what was merged before belongs to another range."""
        super().set_extra_state(state)
        self._bounds = None

    def affine(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
        """Return the scale [G] > 0 and the integer zero point [G] or None, as forward uses them."""
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        scale = self.scale.to(dtype)
        if self.learns_scale:
            scale = scale.abs()
        scale = scale.clamp(TINY, largest_scale(self.grid))  # also where model.half() rounded it to zero
        zero = None if self.zero_point is None else self.zero_point.to(dtype)
        if zero is not None and self.learns_zero_point:
            rounded = zero.round().clamp(self.grid.lowest, self.grid.highest)
            zero = rounded.detach() + (zero - zero.detach()) if zero.requires_grad else rounded  # exactly rounded
        return scale, zero

    def step(self) -> Tensor:
        """Return the distance of neighbouring levels, [G], detached."""
        return self.affine()[0].detach() * self.grid.step

    def forward(self, x: Tensor) -> Tensor:
        """Return x fake-quantized. The first tensor seen in training sets the range."""
        if not x.numel():
            return x
        self.ensure_range(x)
        scale, zero = self.affine(x.dtype)
        parts = self.grouping.rows(x)
        scales = self.grouping.split(scale, parts)
        zeros = [None] * len(parts) if zero is None else self.grouping.split(zero, parts)
        factor, reach = self.gradient_factor(x), self.reach
        rows = [
            FakeQuantize.apply(p, s, z, mask, self.grid, factor, reach)
            for p, s, z, mask in zip(parts, scales, zeros, self._pruned_rows(x, parts))
        ]
        y = self.grouping.merge(rows, x.shape)
        remember(y, FakeQuantize, rows[0])
        return y

    def ensure_range(self, x: Tensor) -> None:
        """Take the range from x where there is none; in eval mode raise QuantizationError instead."""
        if not self.calibrated:
            if not self.training:
                self.require_range()
            self.calibrate(x.detach())

    @property
    def reach(self) -> float:
        """How far, in steps of the scale, gradient passes beyond the outermost codes: an odd grid rounds from there."""
        return 1.0 if self.grid.step == 2 else 0.0

    def gradient_factor(self, x: Tensor) -> float:
        """Return what scales the gradients of our parameters: 1 / sqrt(values a scale * Q_p), LSQ section 2.2."""
        return float((x.numel() / self.groups * self.grid.highest) ** -0.5)

    def _pruned_rows(self, x: Tensor, parts: list[Tensor]) -> list[Any]:
        pruned = self.pruned(x)
        return [None] * len(parts) if pruned is None else self.grouping.rows(pruned)

    def encode(self, x: Tensor) -> Codes:
        """Return the integer codes of x. Raises QuantizationError on NaN or Inf, or before calibration."""
        self.require_finite(x)
        self.require_range()
        with torch.no_grad():
            scale, zero = self.affine(x.dtype)
            parts = self.grouping.rows(x)
            scales = self.grouping.split(scale, parts)
            zeros = [None] * len(parts) if zero is None else self.grouping.split(zero, parts)
            values = [
                (quantize_rows(p, s, z, self.grid) + (0 if z is None else z)).to(torch.int32)
                for p, s, z in zip(parts, scales, zeros)
            ]
            merged = self.grouping.merge(values, x.shape)
            if (pruned := self.pruned(x)) is not None:
                merged = merged.masked_fill(pruned, 0)
        pattern = self.plan.pattern
        return Codes(merged, scale.detach(), _integers(zero), None, self.grid, self.grouping, x.dtype, pattern)


def _integers(zero: Tensor | None) -> Tensor | None:
    return None if zero is None else zero.detach().to(torch.int32)


@register_quantizer("lsq")
class LSQ(Uniform):
    """Learned step size (Esser et al. 2020, "Learned Step Size Quantization"); the zero point stays as calibrated."""

    learns_scale = True


@register_quantizer("lsq+")
class LSQPlus(LSQ):
    """Learned step and learned zero point (Bhalgat et al. 2020, "LSQ+").

    The paper learns a real offset; ours is held to an integer zero point in forward, so that zero padding stays
    exact and every runtime can execute it.
    """

    learns_zero_point = True

    def __init__(self, plan: TensorPlan, grouping: Grouping, groups: int, **options: Any) -> None:
        if plan.symmetric:
            raise PlanError("quantizer 'lsq+' learns a zero point: use symmetric=False, or 'lsq'")
        super().__init__(plan, grouping, groups, **options)
