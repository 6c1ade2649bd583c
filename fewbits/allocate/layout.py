"""What a search moves: the widths of weights, and of inputs where these are searched too, as one list of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fewbits.allocate.problem import Problem
from fewbits.allocate.style import edge_layers
from fewbits.errors import BudgetError, PlanError
from fewbits.plan import LayerPlan, Plan, TensorPlan

Complete = Callable[[Plan], Plan]
INT8 = 8


@dataclass(frozen=True)
class Item:
    """One width that may change. layer: the owner of the weight, or the layer that the input feeds. kind: "weight" or
    "input". choices: ascending.
    """

    layer: str
    kind: str
    choices: tuple[int, ...]

    def at_least(self, bits: int) -> int:
        """Return the narrowest choice of at least ``bits``, or the widest."""
        return next((b for b in self.choices if b >= bits), self.choices[-1])

    def step(self, bits: int, up: bool) -> int | None:
        """Return the next choice above or below ``bits``, None where there is none."""
        index = self.choices.index(bits) + (1 if up else -1)
        return self.choices[index] if 0 <= index < len(self.choices) else None


class Layout:
    """The items of a problem, and the plan and the costs of a list of their bits.

    complete: what a caller adds to every plan (rules that win over the choice, quantized results). Layers whose width
    it decides are no items. Raises PlanError where nothing is left to choose.
    """

    def __init__(self, problem: Problem, *, activations: bool = False, complete: Complete | None = None) -> None:
        self.problem, self._complete = problem, complete
        candidates = [Item(name, "weight", choices) for name, choices in problem.choices().items()]
        if activations:
            candidates += [Item(name, "input", choices) for name, choices in _input_choices(problem).items()]
        candidates = [item for item in candidates if len(item.choices) > 1]
        self.items = tuple(candidates)
        self.items = tuple(item for item in candidates if self._free(item))
        if not self.items:
            raise PlanError(
                f"there is nothing to choose: no layer may take more than one of the widths {problem.menu} with "
                f"first_last={problem.style.first_last}"
            )
        self._known: dict[tuple[int, ...], dict[str, float]] = {}

    def _free(self, item: Item) -> bool:
        """Tell whether the width of an item is what its plan then says."""
        for choose in (min, max):
            bits = [choose(i.choices) for i in self.items]
            layer = dict(self.decided(bits)).get(item.layer)
            tensor = None if layer is None else getattr(layer, item.kind)
            if tensor is None or tensor.bits != choose(item.choices):
                return False
        return True

    def decided(self, bits: Sequence[int]) -> Mapping[str, LayerPlan | None]:
        """Return the decision for every layer."""
        return self.plan(bits).resolve(self.problem.shape.names, self.problem.shape.outputs)

    def plan(self, bits: Sequence[int]) -> Plan:
        """Return the whole plan for the bits of all items."""
        problem, chosen = self.problem, dict(zip(self.items, bits, strict=True))
        widths = {name: choices[-1] for name, choices in problem.choices().items()}
        widths |= {item.layer: b for item, b in chosen.items() if item.kind == "weight"}
        inputs = {item.layer: b for item, b in chosen.items() if item.kind == "input"}
        rules = [
            (name, _with_input(layer, inputs.get(name)))
            for name, layer in problem.style.rules(problem.shape, problem.spread(widths))
        ]
        plan = Plan(tuple(rules))
        return plan if self._complete is None else self._complete(plan)

    def costs(self, bits: Sequence[int]) -> dict[str, float]:
        """Return the costs of the plan, by the names of limits."""
        key = tuple(bits)
        if key not in self._known:
            self._known[key] = self.problem.plan_costs(self.plan(bits))
        return dict(self._known[key])

    def at(self, bits: int) -> list[int]:
        """Return the list that is nearest to the same width everywhere."""
        return [item.at_least(bits) for item in self.items]

    def require_possible(self) -> None:
        """Raise BudgetError, saying the least that is possible, for a limit that the lowest widths do not meet."""
        least = self.costs([item.choices[0] for item in self.items])
        over = self.problem.budget.exceeded(least)
        if over:
            told = "; ".join(
                f"a budget of {name}={limit:,.12g} cannot be met: the least possible is {cost:,.12g}"
                for name, (cost, limit) in over.items()
            )
            raise BudgetError(
                f"{told} with the menu {self.problem.menu} and first_last={self.problem.style.first_last}; raise the "
                "budget, or take a lower width"
            )

    def named(self, bits: Sequence[int]) -> dict[str, int]:
        """Return bits by name: of the layer for its weight, NAME.input for its input."""
        names = (item.layer if item.kind == "weight" else f"{item.layer}.input" for item in self.items)
        return dict(zip(names, bits, strict=True))


def _input_choices(problem: Problem) -> dict[str, tuple[int, ...]]:
    """Return the widths that the input of each layer may take: those of the menu, up to what the style gives it."""
    style, edges, found = problem.style, edge_layers(problem.shape), {}
    if style.act_bits is None:
        raise PlanError("widths of activations are searched from act_bits downwards: give act_bits=8")
    for layer in problem.shape.layers:
        planned = style.layer(layer, INT8, edge=layer.name in edges).input
        if planned is not None:
            low = style.first_last or 0 if layer.name in edges else 0
            found[layer.name] = tuple(sorted({b for b in problem.menu if low <= b < planned.bits} | {planned.bits}))
    return found


def _with_input(layer: LayerPlan | None, bits: int | None) -> LayerPlan | None:
    if layer is None or bits is None or layer.input is None:
        return layer
    given: TensorPlan = replace(layer.input, bits=bits)
    return replace(layer, input=given)
