"""Allocation by order or by chance: what the searches are to be compared with.

``sigma_order`` gives the layers of larger weight standard deviation more bits, ``reversed_sigma`` fewer, ``random``
knows nothing of the layers. All three spend the budget: no single layer could be raised within it, and (in the two
orders) without breaking the order.
"""

from __future__ import annotations

import math
import random as chance
from collections.abc import Sequence

from fewbits.allocate.problem import Problem, allocator
from fewbits.allocate.separable import require_possible
from fewbits.errors import BudgetError, PlanError, QuantizationError
from fewbits.layers.swap import layer_weight
from fewbits.plan import Plan


@allocator("random")
def random(problem: Problem, *, seed: int = 0) -> Plan:
    """Draw bits of the menu for each layer evenly, then lower layers by chance until every limit is met.

    What is left is spent on layers drawn by chance. The same seed gives the same plan. Raises BudgetError, saying the
    least that is possible, for a budget below it.
    """
    tables, draw = _Tables(problem, "random"), chance.Random(seed)
    levels = [draw.randrange(len(options)) for options in tables.choices]
    while not tables.fit(levels):
        levels[draw.choice([i for i, level in enumerate(levels) if level > 0])] -= 1
    tables.spend(levels, draw.sample(range(len(levels)), len(levels)))
    return problem.plan(tables.bits(levels), "random", seed=seed)


@allocator("sigma_order")
def sigma_order(problem: Problem) -> Plan:
    """Give the bits of the menu in the order of the layers' sigma: the largest sigma gets the most.

    sigma: standard deviation of all entries of a layer's weight, in float. The widths are spread over the ranks in
    contiguous groups as even as the budget allows. Layers that may not take the whole menu (the two ends, with
    ``first_last``) stand aside at the least they may take. Raises BudgetError, saying the least that is possible, for
    a budget below it.
    """
    return _by_rank(problem, "sigma_order")


@allocator("reversed_sigma")
def reversed_sigma(problem: Problem) -> Plan:
    """Give the bits of the menu against the order of the layers' sigma: as ``sigma_order``, ranks turned around."""
    return _by_rank(problem, "reversed_sigma")


def layer_sigmas(problem: Problem) -> dict[str, float]:
    """Return the standard deviation of the weight of every layer that owns one. Raises QuantizationError for NaN."""
    found = {}
    for name in problem.choices():
        weight = layer_weight(problem.model.get_submodule(name))
        assert weight is not None
        found[name] = float(weight.detach().double().std(correction=0))
        if not math.isfinite(found[name]):
            raise QuantizationError(
                f"weight of layer {name!r} has the standard deviation {found[name]}: look for NaN or Inf in it"
            )
    return found


class _Tables:
    """Costs of every choice under every limit; a map is a list of levels, indices into the choices of each owner."""

    def __init__(self, problem: Problem, method: str) -> None:
        choices = problem.choices()
        if not choices:
            raise PlanError(f"method {method!r} chooses bits of weights, and no layer of this model has one of its own")
        self.owners, self.choices, self.problem = list(choices), list(choices.values()), problem
        self.limits: list[tuple[list[list[float]], float]] = []
        for limit in problem.budget.limits:
            costs, left = problem.costs(limit)
            require_possible(problem, costs, left, limit)
            self.limits.append((list(costs.values()), left))
        if not self.fit([0] * len(self.owners)):
            raise BudgetError(
                f"method {method!r} starts from the lowest widths of the menu {problem.menu}, and those do not meet "
                f"{dict(problem.budget.limits)}: raise the budget, or take method='solver'"
            )

    def fit(self, levels: Sequence[int]) -> bool:
        """Tell whether a map meets every limit."""
        return all(sum(float(row[level]) for row, level in zip(rows, levels)) <= left for rows, left in self.limits)

    def spend(self, levels: list[int], order: Sequence[int], *, ranked: bool = False) -> None:
        """Raise layers by one level, in turns of ``order``, as long as one fits. ranked: bits never rise along it."""
        raised = True
        while raised:
            raised = False
            for place, i in enumerate(order):
                blocked = ranked and place > 0 and levels[order[place - 1]] <= levels[i]
                if blocked or levels[i] + 1 == len(self.choices[i]):
                    continue
                levels[i] += 1
                if self.fit(levels):
                    raised = True
                else:
                    levels[i] -= 1

    def bits(self, levels: Sequence[int]) -> dict[str, int]:
        """Return bits by layer name."""
        return self.problem.spread({o: c[level] for o, c, level in zip(self.owners, self.choices, levels)})


def _by_rank(problem: Problem, method: str) -> Plan:
    tables, sigmas = _Tables(problem, method), layer_sigmas(problem)
    sign = 1 if method == "sigma_order" else -1
    ordered = sorted(range(len(tables.owners)), key=lambda i: sign * sigmas[tables.owners[i]])
    ranked = [i for i in ordered if tables.choices[i] == problem.menu]
    levels, places, widths = [0] * len(tables.owners), len(ranked), len(problem.menu)
    # at a shift of 0 the groups are even; every shift by one raises the layers next to a border between two groups
    for shift in range(-widths * places, widths * places + 1):
        tried = list(levels)
        for place, i in enumerate(ranked):
            tried[i] = min(max(0, (widths * place + shift) // places), widths - 1)
        if not tables.fit(tried):
            break
        levels = tried
    tables.spend(levels, ranked[::-1], ranked=True)
    return problem.plan(tables.bits(levels), method, sigma=sigmas)
