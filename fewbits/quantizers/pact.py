"""PACT: a learned clip of activations (Choi et al. 2018, "PACT: Parameterized Clipping Activation")."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import PlanError
from fewbits.plan import TensorPlan
from fewbits.quantizers.base import register_quantizer
from fewbits.quantizers.fake_quantize import _values as quantized_rows
from fewbits.quantizers.grouping import Grouping
from fewbits.quantizers.uniform import Uniform

NEGATIVE = 0.05  # of the largest magnitude: SiLU and GELU reach below zero, too, and lose it


@register_quantizer("pact")
class PACT(Uniform):
    """y = round(clip(x, 0, a) / s) s, s = a / (2**b - 1), with a learned clip a per tensor, eq. 1-2 of the paper.

    Where symmetric, x is clipped to -a..a on the mirrored grid: for signed inputs, as behind a fusion's norm. Gradient:
    straight-through to x inside the clip, and to a the sum of what was clipped (eq. 3). It is for activations;
    the paper's weights are DoReFa's, whose tanh rescales a trained network, so take ``lsq`` or ``ste`` for them. The
    paper decays a like the weights; our trainers do not decay quantizers. Warns where negative inputs meet a clip at 0.
    """

    learns_scale = True
    can_prune = False
    clip: Tensor

    def __init__(self, plan: TensorPlan, grouping: Grouping, groups: int, **options: Any) -> None:
        if options.get("odd") or (plan.bits == 1 and plan.symmetric):
            raise PlanError("quantizer 'pact' has no odd grid: use two bits or more, symmetric=False, or 'lsq'")
        if plan.symmetric:
            options = {"narrow": True, **options}
        super().__init__(plan, grouping, groups, **options)

    def _hold(self, name: str, value: Tensor | None, learned: bool) -> None:
        if name == "scale" and value is not None:
            self.clip = nn.Parameter(value * self.grid.highest)
        elif name == "zero_point":
            self.register_buffer(name, None)  # the lowest level is zero

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """The step a / Q_p, [G]."""
        return self.clip.abs() / self.grid.highest

    def _set_scale(self, scale: Tensor) -> None:
        self.clip.copy_(scale * self.grid.highest)

    def calibrate(self, x: Tensor) -> None:
        """Set the clip from x by the plan's range search."""
        self.require_finite(x)
        if not self.plan.symmetric and x.numel():
            low, high = float(x.min()), float(x.max())
            if -low > NEGATIVE * max(high, -low):
                warnings.warn(
                    f"{self.label}values down to {low:.3g} (up to {high:.3g}) meet an unsigned 'pact', which cuts them "
                    "at zero: use symmetric=True for this input",
                    stacklevel=2,
                )
            x = x.clamp(min=0.0)
        super().calibrate(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return x fake-quantized. The first tensor seen in training sets the clip."""
        if not x.numel():
            return x
        self.ensure_range(x)
        scale, _ = self.affine(x.dtype)
        parts = self.grouping.rows(x)
        rows = []
        for part, column in zip(parts, self.grouping.split(scale, parts)):
            high = column * self.grid.highest
            clipped = torch.minimum(part.to(column.dtype), high)
            clipped = torch.maximum(clipped, -high) if self.grid.lowest < 0 else clipped.clamp(min=0.0)
            with torch.no_grad():
                y = quantized_rows(torch.empty_like(part), part.detach(), column.detach(), None, None, self.grid)
            rows.append(y + (clipped - clipped.detach()).to(y.dtype))  # adds zero: forward stays exact
        return self.grouping.merge(rows, x.shape)
