"""How SigmaQuant quantizes 2-bit weights: ternary {-s, 0, s}, with three ways to find s."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fewbits.allocate.style import Style
from fewbits.errors import PlanError, nearest
from fewbits.plan import TensorPlan

SCALES = ("absmax", "mse", "learned")


@dataclass(frozen=True)
class Ternary(Style):
    """A style whose 2-bit weights are ternary.

    scale2: "absmax" takes s = max|w| anew in each forward (arXiv 2602.22136; most weights of a bell-shaped layer then
    round to 0), "mse" the s of least squared error, once, "learned" starts there and learns it. Raises PlanError for
    another.
    """

    scale2: str = "absmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale2 not in SCALES:
            raise PlanError(f"unknown scale2 {self.scale2!r}{nearest(self.scale2, SCALES)}; known: {SCALES}")

    def weight(self, bits: int) -> TensorPlan:
        """Return the plan of a weight of ``bits``."""
        if bits != 2:
            return super().weight(bits)
        if self.scale2 == "absmax":
            return TensorPlan(2, "dynamic", granularity=self.granularity, block=self.block)
        quantizer = "ste" if self.scale2 == "mse" else "lsq"
        return TensorPlan(2, quantizer, granularity=self.granularity, block=self.block, options={"narrow": True})


def ternary(style: Style, scale2: str | None) -> Style:
    """Return the style with ternary 2-bit weights; None leaves it as it is."""
    if scale2 is None:
        return style
    return Ternary(**{f.name: getattr(style, f.name) for f in fields(Style)}, scale2=scale2)
