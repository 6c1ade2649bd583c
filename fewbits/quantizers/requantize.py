"""The input quantizer that a fusion node is folded into: gain of each channel and mean go into the codes themselves.

q = clip(round(a x / (sigma s)) - k): what quantizes (a x - mu) / sigma with step s, where mu / sigma is k whole steps.
In ONNX it is one QuantizeLinear with a scale a channel and a moved zero point, in the place of the one that was there.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.errors import PlanError, QuantizationError
from fewbits.plan import TensorPlan
from fewbits.quantizers.base import register_quantizer
from fewbits.quantizers.codes import Codes, cast
from fewbits.quantizers.grouping import Grouping
from fewbits.quantizers.n2uq import N2UQ
from fewbits.quantizers.uniform import Uniform


class Settled(Uniform):
    """Base: made by ``fold_fusion``, or by loading what it has made; its range stays as it was then."""

    tables: ClassVar[tuple[str, ...]]  # buffers with an entry for each channel, whose number is that of the fusion

    def calibrate(self, x: Tensor) -> None:
        """Raise QuantizationError: the range is that of the fusion that was folded."""
        raise QuantizationError(f"{self.label}a fusion was folded into this quantizer: calibrate the model before that")

    def reset(self) -> None:
        """Raise QuantizationError, as ``calibrate`` does."""
        self.calibrate(torch.empty(0))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the tables as they come: their sizes are known only from what was saved."""
        for name in self.tables:
            if (saved := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *args)


@register_quantizer("requantize")
class Requantize(Settled):
    """Codes of x with a divisor for each channel, shifted by whole steps; decoded with the one step ``scale``.

    divisors [C] (or [1]): sigma s / a, in units of the input. shift: k. Gradient: straight-through to x inside the
    clip, times the gain.
    """

    tables = ("divisors",)
    divisors: Tensor
    shift: Tensor

    def __init__(self, plan: TensorPlan, grouping: Grouping, groups: int, **options: Any) -> None:
        super().__init__(plan, grouping, groups, **options)
        if plan.granularity != "tensor" or self.grid.step != 1:
            raise PlanError("a requantizer has one step for the tensor, and no odd grid")
        self.register_buffer("divisors", torch.ones(1))
        self.register_buffer("shift", torch.zeros((), dtype=torch.int32))

    def take_over(self, old: Uniform, gains: Tensor, sigma: Tensor, mu: Tensor) -> None:
        """Quantize x [.., C, ..] as ``old`` does (gains x - mu) / sigma, with mu rounded to whole steps.

        gains [C] (or [1]), sigma and mu one number each, in float32.
        """
        scale, zero = (None if t is None else t.detach() for t in old.affine())
        assert scale is not None
        self.scale.copy_(scale)
        if self.zero_point is not None and zero is not None:
            self.zero_point.copy_(zero)
        self.divisors = (sigma * scale) / gains
        self.shift.fill_(whole_steps(mu, sigma, scale))
        self.calibrated, self.label = 1, old.label

    def bounds(self) -> tuple[float, float]:
        """Return the lowest and the highest code, less the zero point."""
        zero = 0.0 if self.zero_point is None else float(self.zero_point)
        return self.grid.lowest - zero, self.grid.highest - zero

    def _centered(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (codes less the zero point, a x / (sigma s)), in the dtype of statistics."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        shape = [1] * x.ndim
        shape[self.grouping.axis] = -1
        scaled = x.to(dtype) / self.divisors.to(dtype).reshape(shape if len(self.divisors) > 1 else [1] * x.ndim)
        return (scaled.detach().round() - self.shift).clamp(*self.bounds()), scaled

    def forward(self, x: Tensor) -> Tensor:
        """Return x fake-quantized, same shape and dtype."""
        codes, scaled = self._centered(x)
        within = (scaled - self.shift).clamp(*self.bounds())
        scale, _ = self.affine(x.dtype)
        return cast((codes + (within - within.detach())) * scale, x.dtype)

    def encode(self, x: Tensor) -> Codes:
        """Return the integer codes of x. Raises QuantizationError on NaN or Inf."""
        self.require_finite(x)
        scale, zero = self.affine(x.dtype)
        values = self._centered(x.detach())[0] + (0 if zero is None else zero)
        point = None if zero is None else zero.to(torch.int32)
        return Codes(values.to(torch.int32), scale.detach(), point, None, self.grid, self.grouping, x.dtype)


@register_quantizer("rethreshold")
class Rethreshold(Settled):
    """As ``Requantize`` for learned thresholds T: x is held against (sigma T + mu) / a, with nothing rounded.

    limits [C, levels - 1] (or one row). Gradient: straight-through at the mean slope between first and last threshold.
    """

    tables = ("limits",)
    limits: Tensor

    def __init__(self, plan: TensorPlan, grouping: Grouping, groups: int, **options: Any) -> None:
        super().__init__(plan, grouping, groups, **options)
        if plan.granularity != "tensor" or plan.bits > 8 or self.grid.highest - self.grid.lowest < 2:
            raise PlanError("folded thresholds are per tensor, of 2 to 8 bits")
        self.register_buffer("limits", torch.zeros(1, self.grid.highest - self.grid.lowest))
        self.zero_point = None  # the lowest level is zero

    def take_over(self, old: N2UQ, gains: Tensor, sigma: Tensor, mu: Tensor) -> None:
        """Quantize x [.., C, ..] as ``old`` does (gains x - mu) / sigma; gains [C] (or [1]), one sigma and one mu."""
        self.scale.copy_(old.affine()[0].detach())
        self.limits = (old.thresholds()[None] * sigma + mu) / gains[:, None]
        self.calibrated, self.label = 1, old.label

    def columns(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Return for each threshold its values, ascending, to broadcast over x."""
        trailing = [1] * (-1 - self.grouping.axis)  # axes of activations are counted from the end
        return [column.to(dtype).reshape(-1, *trailing) for column in self.limits.unbind(1)]

    def _count(self, x: Tensor) -> Tensor:
        wide = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        count = torch.zeros_like(wide)
        for column in self.columns(wide.dtype):
            count += wide >= column
        return count + self.grid.lowest

    def forward(self, x: Tensor) -> Tensor:
        """Return x fake-quantized, same shape and dtype."""
        scale, _ = self.affine(x.dtype)
        y = self._count(x) * scale
        first, *_, last = self.columns(y.dtype)
        within = ((x.to(y.dtype) - first) / (last - first)).clamp(0, 1) * ((self.limits.shape[1] - 1) * scale)
        return cast(y + (within - within.detach()), x.dtype)

    def encode(self, x: Tensor) -> Codes:
        """Return the integer codes of x. Raises QuantizationError on NaN or Inf."""
        self.require_finite(x)
        scale, values = self.affine(x.dtype)[0].detach(), self._count(x).to(torch.int32)
        return Codes(values, scale, None, None, self.grid, self.grouping, x.dtype)


def whole_steps(mu: Tensor, sigma: Tensor, scale: Tensor) -> int:
    """Return mu / sigma in whole steps."""
    return round(float(mu / (sigma * scale)))
