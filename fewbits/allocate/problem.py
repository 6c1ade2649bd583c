"""The problem that every allocation method solves, and the registry of methods.

A method is one file with one function ``(problem, **options) -> Plan``, registered by name::

    @allocator("mine")
    def mine(problem: Problem, *, patience: int = 3) -> Plan: ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fewbits.allocate.budget import Budget, plan_costs
from fewbits.allocate.style import Style, edge_layers
from fewbits.cost import LayerShape, ModelShape, fixed_bytes, layer_bops, layer_size, weight_bits
from fewbits.errors import BudgetError, PlanError, nearest
from fewbits.plan import WEIGHT_BITS, LayerPlan, Plan

Method = Callable[..., Plan]
METHODS: dict[str, Method] = {}


@dataclass(frozen=True)
class Problem:
    """model and its shape; budget; menu: the weight bits to choose from, ascending; style: the rest of a plan."""

    model: nn.Module
    shape: ModelShape
    budget: Budget
    menu: tuple[int, ...]
    style: Style

    def __post_init__(self) -> None:
        if not self.menu or any(isinstance(b, bool) or b not in WEIGHT_BITS for b in self.menu):
            raise PlanError(f"a menu of weight bits holds some of {WEIGHT_BITS}, got {self.menu}")
        object.__setattr__(self, "menu", tuple(sorted(set(self.menu))))
        if "bops" in self.budget.limits and not self.shape.ran:
            raise BudgetError("a budget of bops needs an example batch, to count operations on: give example=")

    def plan(self, bits: Mapping[str, int], method: str, **decided_from: Any) -> Plan:
        """Return the plan with these weight bits by layer name; it tells method, budget and predicted cost."""
        rules = self.style.rules(self.shape, bits)
        told = {
            "method": method,
            "budget": self.budget.limits,
            "predicted": plan_costs(Plan(rules), self.shape),
            "menu": list(self.menu),
        }
        return Plan(rules, told | decided_from)

    def choices(self) -> dict[str, tuple[int, ...]]:
        """Return the bits that each weight may take, by the layer that owns it: the menu, less at the two ends."""
        edges, style = edge_layers(self.shape), self.style
        owners = [layer for layer in self.shape.layers if layer.weight_shape and not layer.shared]
        return {
            layer.name: tuple(sorted({style.at_edge(b) for b in self.menu})) if layer.name in edges else self.menu
            for layer in owners
        }

    def spread(self, bits: Mapping[str, int]) -> dict[str, int]:
        """Return bits by layer name for bits by owner: layers that share a weight share its bits."""
        return {layer.name: bits[layer.shared or layer.name] for layer in self.shape.layers if layer.weight_shape}

    def costs(self, limit: str) -> tuple[dict[str, list[float]], float]:
        """Return (cost of each choice by owner, what is left of the budget for them) under the named limit."""
        measure, edges = MEASURES[limit], edge_layers(self.shape)

        def cost(layer: LayerShape, bits: int) -> float:
            return measure(layer, self.style.layer(layer, bits, edge=layer.name in edges))

        groups: dict[str, list[LayerShape]] = {}
        for layer in self.shape.layers:
            groups.setdefault(layer.shared or layer.name, []).append(layer)
        table = {
            owner: [float(sum(cost(layer, bits) for layer in groups[owner])) for bits in choices]
            for owner, choices in self.choices().items()
        }
        rest = sum(cost(g[0], 8) for owner, g in groups.items() if owner not in table)
        return table, self.budget.limits[limit] * self.unit(limit) - rest - self.constant(limit)

    def unit(self, limit: str) -> int:
        """Return how many of what MEASURES counts make one of the limit."""
        return max(self.shape.numel, 1) if limit == "average_bits" else 1

    def constant(self, limit: str) -> int:
        """Return what the model costs beside its quantizable layers."""
        return fixed_bytes(self.shape) if limit == "size_bytes" else 0


def _bits(layer: LayerShape, plan: LayerPlan) -> float:
    return 0 if layer.shared else layer.numel * weight_bits(layer, plan)


MEASURES: dict[str, Callable[[LayerShape, LayerPlan], float]] = {
    "size_bytes": lambda layer, plan: layer_size(layer, plan).total,
    "average_bits": _bits,
    "bops": layer_bops,
}


def allocator(name: str) -> Callable[[Method], Method]:
    """Decorator: make an allocation method known by name."""

    def add(method: Method) -> Method:
        if METHODS.setdefault(name, method) is not method:
            raise PlanError(f"an allocation method named {name!r} is registered already")
        return method

    return add


def find_method(name: str, options: Mapping[str, Any]) -> Method:
    """Return a method by name. Raises PlanError for an unknown name or option, with near ones."""
    if name not in METHODS:
        raise PlanError(f"unknown allocation method {name!r}{nearest(name, METHODS)}; known: {sorted(METHODS)}")
    known = [p.name for p in inspect.signature(METHODS[name]).parameters.values()][1:]
    for option in options:
        if option not in known:
            raise PlanError(
                f"method {name!r} has no option {option!r}{nearest(option, known)}; it takes {known or 'none'}"
            )
    return METHODS[name]
