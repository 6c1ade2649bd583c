"""The budget: what a plan may cost, and what accuracy it must keep."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewbits.cost import ModelShape, bops, size
from fewbits.errors import BudgetError, nearest
from fewbits.plan import Plan

MEGABYTE = 1_000_000
REFERENCES = ("int8", "fp32")
LIMITS = ("size_mb", "size_bytes", "average_bits", "bops", "energy_uj", "latency_ms")
ON_HARDWARE = ("energy_uj", "latency_ms")
BY_EXAMPLE = ("bops", *ON_HARDWARE)  # limits of what the example batch takes


@dataclass(frozen=True)
class Budget:
    """Targets, all of them holding: upper limits of costs, and floors of the accuracy.

    size_mb: millions of bytes of the packed tensors; or the same limit as size_bytes. average_bits: mean over all
    quantizable weights. bops: bit operations of the example batch. energy_uj, latency_ms: microjoules and milliseconds
    of the example batch on ``hardware``, the name or the file of a description. accuracy: percent, as a method's
    ``evaluate`` tells it. accuracy_drop: points that may be lost against the ``reference``, the trained "int8" model
    (the default) or the float one, "fp32". Raises BudgetError if nothing is given, the size is given twice, a target
    is out of its range, or one is given without what it needs.
    """

    size_mb: float | None = None
    size_bytes: int | None = None
    average_bits: float | None = None
    bops: float | None = None
    energy_uj: float | None = None
    latency_ms: float | None = None
    hardware: str | None = None
    accuracy: float | None = None
    accuracy_drop: float | None = None
    reference: str | None = None

    def __post_init__(self) -> None:
        for name in LIMITS:
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                raise BudgetError(f"{name} must be a positive number, got {value!r}")
        for name in ("accuracy", "accuracy_drop"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 <= value <= 100):
                raise BudgetError(f"{name} is in percent, from 0 to 100, got {value!r}")
        if self.size_mb is not None and self.size_bytes is not None:
            raise BudgetError(f"size_mb={self.size_mb} and size_bytes={self.size_bytes} are the same limit: give one")
        self._check_pairs()
        if not self.targets:
            raise BudgetError(f"a budget needs at least one limit: give one of {sorted((*LIMITS, 'accuracy'))}")

    def _check_pairs(self) -> None:
        wanting = [name for name in ON_HARDWARE if getattr(self, name) is not None]
        if wanting and self.hardware is None:
            raise BudgetError(f"{wanting[0]} needs hardware=, the name or the file of a hardware description")
        if self.hardware is not None and not wanting:
            raise BudgetError(f"hardware={self.hardware!r} without a limit on it: give one of {ON_HARDWARE}")
        if self.reference is not None and self.reference not in REFERENCES:
            hint = nearest(str(self.reference), REFERENCES)
            raise BudgetError(f"reference must be one of {REFERENCES}, got {self.reference!r}{hint}")
        if self.reference is not None and self.accuracy_drop is None:
            raise BudgetError(f"reference={self.reference!r} is what accuracy_drop counts from: give that too")

    @property
    def limits(self) -> dict[str, float]:
        """The given limits of costs by name: size_bytes, average_bits, bops, energy_uj, latency_ms."""
        size_bytes = self.size_bytes if self.size_mb is None else math.floor(round(self.size_mb * MEGABYTE, 6))
        limits = {"size_bytes": size_bytes} | {name: getattr(self, name) for name in LIMITS[2:]}
        return {name: limit for name, limit in limits.items() if limit is not None}

    @property
    def floors(self) -> dict[str, float]:
        """The given floors of the accuracy by name: accuracy, accuracy_drop."""
        floors = {name: getattr(self, name) for name in ("accuracy", "accuracy_drop")}
        return {name: floor for name, floor in floors.items() if floor is not None}

    @property
    def targets(self) -> dict[str, Any]:
        """All that is given, as plain data."""
        more = {"hardware": self.hardware, "reference": self.reference}
        return {**self.limits, **self.floors, **{name: value for name, value in more.items() if value is not None}}

    def without_floors(self) -> Budget:
        """Return the limits of costs alone. Raises BudgetError where there are none."""
        return dataclasses.replace(self, accuracy=None, accuracy_drop=None, reference=None)

    def exceeded(self, costs: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Return {name: (cost, limit)} for every limit that ``costs`` (as of ``plan_costs``) are above."""
        limits = self.limits
        return {n: (costs[n], limit) for n, limit in limits.items() if costs[n] > limit * (1 + 1e-12)}


def plan_costs(plan: Plan, shape: ModelShape) -> dict[str, float]:
    """Return what a plan costs, by the names of limits; ``bops`` only if the shape was taken with an example.

    What a plan costs on a hardware is a matter of ``Problem.plan_costs``, which knows the weights.
    """
    weighed = size(plan, shape)
    costs: dict[str, float] = {
        "size_bytes": weighed.total,
        "average_bits": weighed.average_weight_bits,
    }
    return costs | ({"bops": bops(plan, shape)} if shape.ran else {})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
