"""The problem that every allocation method solves, and the registry of methods.

A method is one file with one function ``(problem, **options) -> Plan``, registered by name::

    @allocator("mine")
    def mine(problem: Problem, *, patience: int = 3) -> Plan: ...
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from fewbits.allocate.budget import BY_EXAMPLE, ON_HARDWARE, Budget, plan_costs
from fewbits.allocate.style import Style, edge_layers
from fewbits.cost import (
    Hardware,
    LayerShape,
    ModelShape,
    fixed_bytes,
    layer_bops,
    layer_energy,
    layer_latency,
    layer_size,
    plan_cycles,
    weight_bits,
)
from fewbits.errors import BudgetError, PlanError, nearest
from fewbits.plan import WEIGHT_BITS, LayerPlan, Plan, TensorPlan

Method = Callable[..., Plan]
METHODS: dict[str, Method] = {}
SETTINGS: dict[str, type[Any]] = {}  # by method: a dataclass of further options
HOLD_ACCURACY: set[str] = set()  # methods that take a floor of the accuracy


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
        for limit in BY_EXAMPLE:
            if limit in self.budget.limits and not self.shape.ran:
                raise BudgetError(f"a budget of {limit} needs an example batch, to count operations on: give example=")
        _ = self.hardware  # raises now where there is no such description

    @cached_property
    def hardware(self) -> Hardware | None:
        """The hardware of the budget. Raises HardwareError for a description that is missing or malformed."""
        return None if self.budget.hardware is None else Hardware.load(self.budget.hardware)

    @cached_property
    def _cycles(self) -> dict[tuple[str, TensorPlan], float]:
        return {}

    def cycles(self, name: str, weight: TensorPlan | None) -> float | None:
        """Return the mean cycles of a product with a layer's weights as they are, where the hardware counts them."""
        if self.hardware is None or not self.hardware.measures_cycles or weight is None:
            return None
        if (name, weight) not in self._cycles:
            self._cycles[name, weight] = plan_cycles(self.model, Plan(((name, LayerPlan(weight=weight)),)))[name]
        return self._cycles[name, weight]

    def plan_costs(self, plan: Plan) -> dict[str, float]:
        """Return what a plan costs, by the names of limits, those on the budget's hardware among them."""
        costs = plan_costs(plan, self.shape)
        if self.hardware is None:
            return costs
        decided = plan.resolve(self.shape.names, self.shape.outputs)
        plans = [(layer, decided.get(layer.name) or LayerPlan()) for layer in self.shape.layers]
        return costs | {limit: sum(MEASURES[limit](self, *pair) for pair in plans) for limit in ON_HARDWARE}

    def plan(self, bits: Mapping[str, int], method: str, **decided_from: Any) -> Plan:
        """Return the plan with these weight bits by layer name; it tells method, budget and predicted cost."""
        rules = self.style.rules(self.shape, bits)
        told = {
            "method": method,
            "budget": self.budget.targets,
            "predicted": self.plan_costs(Plan(rules)),
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
            return measure(self, layer, self.style.layer(layer, bits, edge=layer.name in edges))

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


def _bits(problem: Problem, layer: LayerShape, plan: LayerPlan) -> float:
    return 0 if layer.shared else layer.numel * weight_bits(layer, plan)


def _energy(problem: Problem, layer: LayerShape, plan: LayerPlan) -> float:
    assert problem.hardware is not None
    return layer_energy(layer, plan, problem.hardware, problem.cycles(layer.name, plan.weight))


def _latency(problem: Problem, layer: LayerShape, plan: LayerPlan) -> float:
    assert problem.hardware is not None
    return layer_latency(layer, plan, problem.hardware, problem.cycles(layer.name, plan.weight))


MEASURES: dict[str, Callable[[Problem, LayerShape, LayerPlan], float]] = {
    "size_bytes": lambda problem, layer, plan: layer_size(layer, plan).total,
    "average_bits": _bits,
    "bops": lambda problem, layer, plan: layer_bops(layer, plan),
    "energy_uj": _energy,
    "latency_ms": _latency,
}


def allocator(
    name: str, settings: type[Any] | None = None, *, holds_accuracy: bool = False
) -> Callable[[Method], Method]:
    """Decorator: make an allocation method known by name.

    settings: a dataclass whose fields are further options, for a method that takes ``**settings``. holds_accuracy:
    it takes budgets with a floor of the accuracy.
    """

    def add(method: Method) -> Method:
        if METHODS.setdefault(name, method) is not method:
            raise PlanError(f"an allocation method named {name!r} is registered already")
        if settings is not None:
            SETTINGS[name] = settings
        if holds_accuracy:
            HOLD_ACCURACY.add(name)
        return method

    return add


def find_method(name: str, options: Mapping[str, Any]) -> Method:
    """Return a method by name. Raises PlanError for an unknown name or option, with near ones."""
    if name not in METHODS:
        raise PlanError(f"unknown allocation method {name!r}{nearest(name, METHODS)}; known: {sorted(METHODS)}")
    known = known_options(name)
    for option in options:
        if option not in known:
            raise PlanError(
                f"method {name!r} has no option {option!r}{nearest(option, known)}; it takes {known or 'none'}"
            )
    return METHODS[name]


def require_takes(name: str, budget: Budget) -> None:
    """Raise BudgetError for a floor of the accuracy and a method that measures none."""
    if budget.floors and name not in HOLD_ACCURACY:
        raise BudgetError(
            f"method {name!r} weighs costs alone and cannot hold {budget.floors}; take one of "
            f"{sorted(HOLD_ACCURACY)} with finetune=, evaluate= and calibration=, or drop the floor"
        )


def known_options(name: str) -> list[str]:
    """Return the names of the options that a registered method takes."""
    parameters = list(inspect.signature(METHODS[name]).parameters.values())[1:]
    own = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return own + ([f.name for f in dataclasses.fields(SETTINGS[name])] if name in SETTINGS else [])
