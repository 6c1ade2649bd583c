"""A symmetric quantizer whose scale follows the largest weight, and whose channels may differ in width."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.errors import PlanError
from fewbits.plan import TensorPlan
from fewbits.quantizers.base import Quantizer, register_quantizer
from fewbits.quantizers.codes import Codes, Grid, cast
from fewbits.quantizers.grouping import Grouping

LEAST = 1e-8  # of the largest magnitude of a row


class RoundToScale(torch.autograd.Function):
    """y = s round(x / s), with the straight-through gradient to x: nothing is clipped, as s is from the largest |x|."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """x [G, m]; scale [G, 1]."""
        return cast((x / scale).round_() * scale, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Pass the gradient on."""
        return grads[0], None, None


@register_quantizer("maxabs")
class MaxAbs(Quantizer):
    """y = s round(x / s), s = max|x| / (2^(b - 1) - 1) of each row, anew in each forward (FairQuant, arXiv 2602.23192).

    Codes mirror around zero: 2 bits are {-1, 0, 1}. With ``plan.channel_bits`` each row has its own b.
    """

    dynamic: ClassVar[bool] = True
    can_mix: ClassVar[bool] = True
    widths: Tensor  # [G], bits

    def __init__(self, plan: TensorPlan, grouping: Grouping, groups: int) -> None:
        super().__init__(plan, grouping, groups)
        if plan.bits < 2 or plan.bits > 8 or not plan.symmetric:
            raise PlanError(
                f"quantizer {plan.quantizer!r} is symmetric, of 2 to 8 bits, got bits={plan.bits}, "
                f"symmetric={plan.symmetric}"
            )
        self.register_buffer("widths", torch.tensor(plan.channel_bits or (plan.bits,) * groups), persistent=False)

    def current(self) -> Tensor:
        """Return the width of each row, int64 [G]."""
        return self.widths

    def calibrate(self, x: Tensor) -> None:
        """There is nothing to set: scales come from each tensor."""
        self.require_finite(x)
        self.calibrated += 1

    def scales(self, x: Tensor) -> list[Tensor]:
        """Return the scale of each row, a column [g, 1] for each part of the grouping."""
        parts = self.grouping.rows(x.detach())
        highest = 2 ** (self.current().to(_wide(x)) - 1) - 1
        return [
            part.to(_wide(x)).abs().amax(1, keepdim=True).clamp(min=LEAST) / top
            for part, top in zip(parts, self.grouping.split(highest, parts))
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Return x fake-quantized."""
        if not x.numel():
            return x
        parts = self.grouping.rows(x)
        rows = [RoundToScale.apply(part.to(_wide(x)), s, x.dtype) for part, s in zip(parts, self.scales(x))]
        return self.grouping.merge(rows, x.shape)

    def encode(self, x: Tensor) -> Codes:
        """Return the integer codes of x. Raises QuantizationError on NaN or Inf."""
        self.require_finite(x)
        with torch.no_grad():
            parts, scales = self.grouping.rows(x), self.scales(x)
            values = [(p.to(_wide(x)) / s).round_().to(torch.int32) for p, s in zip(parts, scales)]
            merged = self.grouping.merge(values, x.shape)
            scale = torch.cat([s.flatten() for s in scales])
        plan = self.settled_plan()
        half = 2 ** (plan.bits - 1)
        grid = Grid(plan.bits, 1 - half, half - 1)
        return Codes(merged, scale, None, None, grid, self.grouping, x.dtype, channel_bits=plan.channel_bits)

    def settled_plan(self) -> TensorPlan:
        """Return the plan of ``maxabs`` with the present widths."""
        widths = tuple(self.current().tolist())
        mixed = widths if len(set(widths)) > 1 else None
        return dataclasses.replace(self.plan, bits=max(widths), quantizer="maxabs", channel_bits=mixed, options={})


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
