"""N2UQ: learned input thresholds that are not uniform, and output levels that are (Liu et al. 2022, "Nonuniform-to-
Uniform Quantization: Towards Accurate Quantization via Generalized Straight-Through Estimation")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import PlanError
from fewbits.plan import TensorPlan
from fewbits.quantizers.base import register_quantizer
from fewbits.quantizers.codes import Codes, cast
from fewbits.quantizers.grouping import Grouping
from fewbits.quantizers.ranges import TINY
from fewbits.quantizers.uniform import Uniform


class Thresholds(torch.autograd.Function):
    """y = (number of thresholds at or below x + lowest) * scale; the generalized straight-through gradient.

    Segment i begins at L_i = start + a_1 + .. + a_(i-1) and is a_i wide; its threshold is its middle. Backward is that
    of the expectation under stochastic rounding (section 3.2 of the paper): u = i - 1 + (x - L_i) / a_i, so slope
    1 / a_i inside segment i and none outside all segments.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, start: Tensor, widths: Tensor, scale: Tensor, middles: Tensor, lowest: int, factor: float
    ) -> Tensor:
        """x of any shape and dtype; start, scale [1], widths, middles [levels - 1]."""
        index = torch.bucketize(x.to(middles.dtype).contiguous(), middles, right=True)
        ctx.save_for_backward(x, start, widths, index)
        ctx.lowest, ctx.factor, ctx.scale = lowest, factor, scale.detach()
        return cast((index + lowest).to(scale.dtype) * scale, x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, start, widths, index = ctx.saved_tensors
        scale, count = ctx.scale, len(widths)
        grad_y, wide = grad.to(scale.dtype), x.to(widths.dtype)
        edges = torch.cat([start, start + widths.cumsum(0)])
        segment = torch.bucketize(wide.contiguous(), edges, right=True) - 1
        inside = (segment >= 0) & (segment < count)
        segment = segment.clamp(0, count - 1)
        width = widths[segment]
        slope = torch.where(inside, grad_y * scale / width, 0.0)  # dL/dx
        within = slope * ((wide - edges[segment]) / width).nan_to_num(0.0)
        each = torch.zeros_like(widths).index_add_(0, segment.flatten(), slope.flatten())
        own = torch.zeros_like(widths).index_add_(0, segment.flatten(), within.flatten())
        later = each.flip(0).cumsum(0).flip(0) - each  # a wider segment moves all those behind it
        steps = (grad_y * (index + ctx.lowest)).sum().reshape(1)
        return (
            slope.to(x.dtype), -ctx.factor * each.sum().reshape(1), -ctx.factor * (own + later), ctx.factor * steps,
            None, None, None,
        )  # fmt: skip


@register_quantizer("n2uq")
class N2UQ(Uniform):
    """Codes 0..2**b - 1 (or signed ones, where symmetric) by learned thresholds; code q stands for q times a step.

    Learned: the widths of the segments between levels, where they start, and the step; at first they make the uniform
    quantizer of the plan's range search. One set a tensor. Its output levels are uniform, so layers pack and multiply
    as with ``lsq``; in ONNX the thresholds are comparisons. For activations; weights of the paper are uniform.
    """

    learns_scale = True
    can_prune = False

    def __init__(self, plan: TensorPlan, grouping: Grouping, groups: int, **options: Any) -> None:
        if plan.granularity != "tensor":
            raise PlanError(f"quantizer 'n2uq' has thresholds per tensor, not per {plan.granularity}")
        if options.get("odd") or plan.bits > 8 or (plan.bits == 1 and plan.symmetric):
            raise PlanError("quantizer 'n2uq' is for 1 (symmetric: 2) to 8 bits, and has no odd grid; use 'lsq'")
        super().__init__(plan, grouping, groups, **options)
        self.start = nn.Parameter(torch.zeros(1))
        self.widths = nn.Parameter(torch.ones(self.grid.highest - self.grid.lowest))

    def _hold(self, name: str, value: Tensor | None, learned: bool) -> None:
        super()._hold(name, None if name == "zero_point" else value, learned)  # the lowest level is zero

    def _set_scale(self, scale: Tensor) -> None:
        super()._set_scale(scale)
        self.start.copy_(scale * self.grid.lowest)
        self.widths.copy_(scale.expand_as(self.widths))

    def calibrate(self, x: Tensor) -> None:
        """Set levels and thresholds from x by the plan's range search."""
        self.require_finite(x)
        super().calibrate(x if self.plan.symmetric else x.clamp(min=0.0))

    def segments(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return the start [1] and the widths [levels - 1] > 0 of the segments, as forward uses them."""
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        limit = 2.0**100
        return self.start.to(dtype).clamp(-limit, limit), self.widths.to(dtype).abs().clamp(TINY, limit)

    def thresholds(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values from which the next code begins, ascending, [levels - 1], detached."""
        start, widths = (t.detach() for t in self.segments(dtype))
        return (start + widths.cumsum(0) - widths / 2).cummax(0).values

    def step(self) -> Tensor:
        """Return the mean distance of thresholds, [1], detached."""
        return self.segments()[1].detach().mean().reshape(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x fake-quantized. The first tensor seen in training sets levels and thresholds."""
        if not x.numel():
            return x
        self.ensure_range(x)
        scale, _ = self.affine(x.dtype)
        start, widths = self.segments(x.dtype)
        given = self.thresholds(x.dtype), self.grid.lowest, self.gradient_factor(x)
        y: Tensor = Thresholds.apply(x, start, widths, scale, *given)
        return y

    def encode(self, x: Tensor) -> Codes:
        """Return the integer codes of x. Raises QuantizationError on NaN or Inf, or before calibration."""
        self.require_finite(x)
        self.require_range()
        with torch.no_grad():
            middles = self.thresholds(x.dtype)
            values = torch.bucketize(x.to(middles.dtype).contiguous(), middles, right=True) + self.grid.lowest
            scale, _ = self.affine(x.dtype)
        return Codes(values.to(torch.int32), scale.detach(), None, None, self.grid, self.grouping, x.dtype)
