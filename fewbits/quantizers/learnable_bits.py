"""BAQ: the width of each channel is a real number that the loss trains (FairQuant, arXiv 2602.23192, section 2.6 ours).

The method's release gives its widths no gradient of the task. Here they have one: through the scale of straight-through
rounding, or of a mixture of the two nearest widths. ``fewbits.train.LearnBits`` moves them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import PlanError
from fewbits.plan import TensorPlan
from fewbits.quantizers.base import register_quantizer
from fewbits.quantizers.codes import cast
from fewbits.quantizers.grouping import Grouping
from fewbits.quantizers.maxabs import LEAST, MaxAbs

MODES = ("ste", "frac")


class RoundToWidth(torch.autograd.Function):
    """y = s round(x / s), s = a / Q, Q = 2^(round(b) - 1) - 1; gradients straight through to x, and through s to b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: Tensor, dtype: torch.dtype) -> Tensor:
        """x [G, m]; width [G, 1], real."""
        y, top = round_rows(x, width.round())
        ctx.save_for_backward(x, y, top)
        return cast(y, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """dL/db = -ln 2 (Q + 1) / Q sum G (y - x)."""
        x, y, top = ctx.saved_tensors
        grad = grads[0]
        by_width = -math.log(2) * (top + 1) / top * (grad.to(x.dtype) * (y - x)).sum(1, keepdim=True)
        return grad, by_width, None


class MixWidths(torch.autograd.Function):
    """y = (1 - f) Q_k(x) + f Q_k+1(x), k = floor(b), at most the highest width less one, f = b - k (after FracBits)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: Tensor, highest: int, dtype: torch.dtype) -> Tensor:
        """x [G, m]; width [G, 1], real."""
        low = width.floor().clamp(max=highest - 1)
        less, _ = round_rows(x, low)
        more, _ = round_rows(x, low + 1)
        ctx.save_for_backward(more - less)
        return cast(less + (width - low) * (more - less), dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """dL/db = sum G (Q_k+1 - Q_k)."""
        (difference,) = ctx.saved_tensors
        grad = grads[0]
        return grad, (grad.to(difference.dtype) * difference).sum(1, keepdim=True), None, None


def round_rows(x: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [G, m] on the symmetric grid of each row's width [G, 1], and the highest codes [G, 1]."""
    top = 2 ** (width - 1) - 1
    scale = x.abs().amax(1, keepdim=True).clamp(min=LEAST) / top
    return (x / scale).round_() * scale, top


@register_quantizer("learnable_bits")
class LearnableBits(MaxAbs):
    """``maxabs`` whose widths are trained, one a channel (granularity "channel") or one a tensor.

    They start at the plan's, stay within lowest..highest, and are rounded in forward. mode: "ste"; or "frac", where in
    training the two nearest widths are mixed, so that what is trained is what is stored only once widths are frozen.
    Parameter: width [G], float32, in bits. After training ``fewbits.layers.settle_bits`` puts ``maxabs`` in its place.
    """

    def __init__(
        self,
        plan: TensorPlan,
        grouping: Grouping,
        groups: int,
        *,
        lowest: int = 2,
        highest: int = 8,
        mode: str = "ste",
    ) -> None:
        super().__init__(plan, grouping, groups)
        if not 2 <= lowest < highest <= 8 or mode not in MODES:
            raise PlanError(
                f"learnable bits need 2 <= lowest < highest <= 8 and a mode of {MODES}, got {lowest}..{highest} and "
                f"{mode!r}"
            )
        self.lowest, self.highest, self.mode = lowest, highest, mode
        self.width = nn.Parameter(self.widths.float().clamp(lowest, highest))
        self.frozen = False  # widths are whole numbers, and stay

    def current(self) -> Tensor:
        """Return the widths as forward rounds them, int64 [G]."""
        return self.width.detach().round().to(torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        """Return x fake-quantized."""
        if not x.numel():
            return x
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        parts = [part.to(dtype) for part in self.grouping.rows(x)]
        widths = self.grouping.split(self.width.to(dtype), parts)
        mixes = self.mode == "frac" and self.training and not self.frozen
        rows = [
            MixWidths.apply(part, b, self.highest, x.dtype) if mixes else RoundToWidth.apply(part, b, x.dtype)
            for part, b in zip(parts, widths)
        ]
        return self.grouping.merge(rows, x.shape)

    def get_extra_state(self) -> dict[str, int]:
        """Return what a checkpoint needs beside tensors."""
        return {**super().get_extra_state(), "frozen": int(self.frozen)}

    def set_extra_state(self, state: Mapping[str, int]) -> None:
        """Undo ``get_extra_state``."""
        super().set_extra_state(state)
        self.frozen = bool(state["frozen"])
        self.width.requires_grad_(not self.frozen)


def project(widths: Tensor, sizes: Tensor, budget: float, lowest: int, highest: int) -> Tensor:
    """Return whole widths [U] near the real ones with sum(sizes * widths) <= budget * sum(sizes).

    All are rounded down; what is left goes to the largest fractions first, one bit each; what is missing is taken from
    the smallest. Where even the lowest widths exceed the budget, they are returned.
    """
    whole = widths.floor().clamp(lowest, highest)
    left = budget * float(sizes.sum()) - float((sizes * whole).sum())
    fraction = widths - whole
    slack = 1e-9 * float(sizes.sum())
    if left >= 0:
        for u in fraction.argsort(descending=True, stable=True).tolist():
            if whole[u] < highest and float(sizes[u]) <= left + slack:
                whole[u] += 1
                left -= float(sizes[u])
        return whole
    while left < -slack and bool((whole > lowest).any()):
        for u in fraction.argsort(stable=True).tolist():
            if left >= -slack:
                break
            if whole[u] > lowest:
                whole[u] -= 1
                left += float(sizes[u])
    return whole
