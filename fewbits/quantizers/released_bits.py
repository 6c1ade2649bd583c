"""BAQ as its release has it, to compare with: widths that the task gives no gradient (FairQuant, arXiv 2602.23192).

There, width = lowest + (highest - lowest) tanh|theta|, and the quantized weight enters as w + stop(w_q - w): so theta
moves by a regulariser alone. With the first release's, sum theta^2, Adam drives all widths down at one speed, whatever
they are worth; with the later one's, mean (theta - theta_0)^2, they stay. ``learnable_bits`` is what to use.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewbits.errors import PlanError
from fewbits.plan import TensorPlan
from fewbits.quantizers.base import register_quantizer
from fewbits.quantizers.grouping import Grouping
from fewbits.quantizers.maxabs import MaxAbs

FRACTION = {"v1": 0.9999, "head": 0.95}  # of the range, that a start is clamped to
STRENGTH = {"v1": 1e-5, "head": 1e-2}  # lambda_b


def theta_of(bits: Tensor, lowest: float, highest: float, release: str) -> Tensor:
    """Return theta for real widths."""
    return torch.atanh(((bits - lowest) / (highest - lowest)).clamp(0, FRACTION[release]))


def bits_of(theta: Tensor, lowest: float, highest: float) -> Tensor:
    """Return the real widths lowest + (highest - lowest) tanh|theta|."""
    return lowest + (highest - lowest) * torch.tanh(theta.abs())


@register_quantizer("released_bits")
class ReleasedBits(MaxAbs):
    """``maxabs`` whose widths follow from theta, and theta from ``penalty`` alone. release: "v1" or "head" (later)."""

    start: Tensor

    def __init__(
        self,
        plan: TensorPlan,
        grouping: Grouping,
        groups: int,
        *,
        lowest: int = 2,
        highest: int = 8,
        release: str = "head",
    ) -> None:
        super().__init__(plan, grouping, groups)
        if release not in FRACTION or not 2 <= lowest < highest <= 8:
            raise PlanError(
                f"released bits need a release of {tuple(FRACTION)} and 2 <= lowest < highest <= 8, got {release!r} "
                f"and {lowest}..{highest}"
            )
        self.lowest, self.highest, self.release = lowest, highest, release
        self.theta = nn.Parameter(theta_of(self.widths.float(), lowest, highest, release))
        self.register_buffer("start", self.theta.detach().clone())

    def current(self) -> Tensor:
        """Return the rounded widths; detached, which makes the release's bits deaf to the task."""
        return bits_of(self.theta.detach(), self.lowest, self.highest).round().to(torch.int64)

    def penalty(self) -> Tensor:
        """Return lambda_b R(theta), a scalar to add to the loss: what alone moves the widths."""
        return penalty(self.theta, self.start, self.release)


def penalty(theta: Tensor, start: Tensor, release: str) -> Tensor:
    """Return lambda_b sum theta^2 of the first release, or lambda_b mean (theta - start)^2 of the later one."""
    moved = theta.square().sum() if release == "v1" else (theta - start).square().mean()
    return STRENGTH[release] * moved
