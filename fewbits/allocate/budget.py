"""The budget: what a plan may cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from fewbits.cost import ModelShape, bops, size
from fewbits.errors import BudgetError
from fewbits.plan import Plan

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Budget:
    """Upper limits, each given one holding: bytes of the packed tensors, mean weight bits, bit operations.

    size_mb: millions of bytes; or the same limit as size_bytes. average_bits: mean over all quantizable weights.
    bops: bit operations of the example batch. Raises BudgetError if nothing is given, the size is given twice, or a
    limit is not a positive number.
    """

    size_mb: float | None = None
    size_bytes: int | None = None
    average_bits: float | None = None
    bops: float | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in given.items():
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise BudgetError(f"{name} must be a positive number, got {value!r}")
        if self.size_mb is not None and self.size_bytes is not None:
            raise BudgetError(f"size_mb={self.size_mb} and size_bytes={self.size_bytes} are the same limit: give one")
        if not self.limits:
            raise BudgetError(f"a budget needs at least one limit: give one of {sorted(given)}")

    @property
    def limits(self) -> dict[str, float]:
        """The given limits by name: size_bytes, average_bits, bops."""
        size_bytes = self.size_bytes if self.size_mb is None else math.floor(round(self.size_mb * MEGABYTE, 6))
        limits = {"size_bytes": size_bytes, "average_bits": self.average_bits, "bops": self.bops}
        return {name: limit for name, limit in limits.items() if limit is not None}

    def exceeded(self, costs: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Return {name: (cost, limit)} for every limit that ``costs`` (as of ``plan_costs``) are above."""
        limits = self.limits
        return {n: (costs[n], limit) for n, limit in limits.items() if costs[n] > limit * (1 + 1e-12)}


def plan_costs(plan: Plan, shape: ModelShape) -> dict[str, float]:
    """Return what a plan costs, by the names of limits; ``bops`` only if the shape was taken with an example."""
    weighed = size(plan, shape)
    costs: dict[str, float] = {
        "size_bytes": weighed.total,
        "average_bits": weighed.average_weight_bits,
    }
    return costs | ({"bops": bops(plan, shape)} if shape.ran else {})
