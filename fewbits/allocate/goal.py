"""Where a search stands: the distance of (accuracy, costs) from its targets, and the region it is in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewbits.allocate.budget import Budget

REGIONS = ("target", "bit-decrease", "bit-increase", "transition", "iteration")


@dataclass(frozen=True)
class Goal:
    """Targets, and the buffers that distances are measured in.

    floor: least accuracy in percent, None: none. accuracy_buffer: points. limits, buffers: of costs, by name.
    """

    floor: float | None
    accuracy_buffer: float
    limits: Mapping[str, float]
    buffers: Mapping[str, float]

    @staticmethod
    def of(
        budget: Budget,
        accuracies: Mapping[str, float],
        int8_costs: Mapping[str, float],
        accuracy_buffer: float,
        cost_buffer: float,
    ) -> Goal:
        """Return the goal of a budget. accuracies: of the references. cost_buffer: as a share of the INT8 model's."""
        floors = [] if budget.accuracy is None else [budget.accuracy]
        if budget.accuracy_drop is not None:
            floors.append(accuracies[budget.reference or "int8"] - budget.accuracy_drop)
        buffers = {name: cost_buffer * int8_costs[name] for name in budget.limits}
        return Goal(max(floors, default=None), accuracy_buffer, budget.limits, buffers)

    def excess(self, accuracy: float, costs: Mapping[str, float]) -> dict[str, float]:
        """Return by how many buffers each target is missed, 0 where it holds."""
        short = 0.0 if self.floor is None else max(0.0, self.floor - accuracy) / self.accuracy_buffer
        # a cost that rounding alone puts above its limit is not above it, as in Budget.exceeded
        over = {
            name: max(0.0, costs[name] - limit) / self.buffers[name] if costs[name] > limit * (1 + 1e-12) else 0.0
            for name, limit in self.limits.items()
        }
        return {**({} if self.floor is None else {"accuracy": short}), **over}

    def distance(self, accuracy: float, costs: Mapping[str, float]) -> float:
        """Return V, the sum of all excesses: 0 where every target holds."""
        return sum(self.excess(accuracy, costs).values())

    def sides(self, accuracy: float, costs: Mapping[str, float]) -> tuple[float, float]:
        """Return the excess of the accuracy, and the largest of the costs."""
        excess = self.excess(accuracy, costs)
        short = excess.pop("accuracy", 0.0)
        return short, max(excess.values(), default=0.0)

    def region(self, accuracy: float, costs: Mapping[str, float], *, rounds_left: bool = False) -> str:
        """Return the name of the region. rounds_left: whether phase 1 may cluster again."""
        short, over = self.sides(accuracy, costs)
        if not short and not over:
            return "target"
        if not short:
            return "bit-decrease"
        if not over:
            return "bit-increase"
        return "iteration" if rounds_left and min(short, over) > 1 else "transition"

    def near(self, accuracy: float, costs: Mapping[str, float]) -> bool:
        """Tell whether the accuracy or all costs are within their buffers: then phase 1 has done its work."""
        return min(self.sides(accuracy, costs)) <= 1

    def missed(self, accuracy: float, costs: Mapping[str, float]) -> dict[str, dict[str, Any]]:
        """Return {target: its value, the target, how far it is off} for each one that does not hold."""
        off = {name for name, value in self.excess(accuracy, costs).items() if value > 0}
        values = {"accuracy": (accuracy, self.floor), **{n: (costs[n], limit) for n, limit in self.limits.items()}}
        return {
            name: {"value": value, "target": target, "distance": abs(value - target)}
            for name, (value, target) in values.items()
            if name in off and target is not None
        }
