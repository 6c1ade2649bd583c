"""Bits by what weights mean to each group (FairQuant, arXiv 2602.23192), per output channel or per layer.

Rules: "solver" (ours), least sum of S_u 4^-b exactly within the budget of average bits; "minimax" (ours), the same with
weights on the groups that make the worst-served group's share least; "quantile" (the method's release), a histogram of
widths over the ranked units; "wquantile" (ours), that histogram over weights, so that units of many weights count more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fewbits.allocate.importance import Importance, Loss, group_importance
from fewbits.allocate.problem import Problem, allocator
from fewbits.allocate.solver import solve
from fewbits.allocate.style import edge_layers
from fewbits.errors import BudgetError, PlanError
from fewbits.plan import Plan, Rule, TensorPlan
from fewbits.quantizers import QUANTIZERS, quantizer_class

RULES = ("solver", "minimax", "quantile", "wquantile")
ROUNDS, RATE = 30, 0.5  # of minimax
TOLERANCE = 1e-6  # of the sum of distortions: thousands of channels need no proof of the last digit

Units = list[tuple[str, int]]  # layer and channel


@allocator("fair")
def fair(
    problem: Problem,
    *,
    groups: Mapping[str, Iterable[Any]] | None = None,
    loss: Loss | None = None,
    metric: str = "grape",
    reducer: str = "balanced",
    alpha: float = 0.1,
    unit: str = "channel",
    rule: str = "solver",
    shares: Sequence[float] | None = None,
    importance: Importance | None = None,
) -> Plan:
    """Choose bits by importance for groups. groups, loss, metric, reducer, alpha: as of ``group_importance``.

    unit: "channel" (the style's quantizer must allow channels of different widths, as "maxabs" does) or "layer".
    rule: see above. shares: of the menu's widths, ascending, for the quantile rules. importance: measured before, in
    place of groups and loss. The limit is ``average_bits``; what the style holds at 8 bits stays there and counts.
    Raises BudgetError for another limit, for one below what is possible, and where shares exceed it.
    """
    if importance is None:
        if groups is None or loss is None:
            raise PlanError("method 'fair' needs groups= {name: batches} and loss=, or importance=")
        importance = group_importance(problem.model, groups, loss, metric=metric, reducer=reducer, alpha=alpha)
    elif groups is not None or loss is not None:
        raise PlanError("importance= is measured already: drop groups= and loss=")
    _check(problem, unit, rule, shares)
    table = _Table(problem, importance, unit, "sum" if rule in ("solver", "minimax") else "mean")
    if rule == "minimax":
        chosen = table.minimax(importance)
    elif rule == "solver":
        chosen = table.least(table.scores)
    else:
        chosen = table.histogram(shares or (), by_weight=rule == "wquantile")
    told = {"metric": importance.metric, "reducer": importance.reducer, "unit": unit, "rule": rule}
    return table.plan(chosen, told | ({} if shares is None else {"shares": list(shares)}))


def _check(problem: Problem, unit: str, rule: str, shares: Sequence[float] | None) -> None:
    limits = list(problem.budget.limits)
    if limits != ["average_bits"]:
        raise BudgetError(f"method 'fair' takes the limit average_bits alone, got {limits}")
    if rule not in RULES:
        raise PlanError(f"rule must be one of {RULES}, got {rule!r}")
    if (shares is not None) != (rule in ("quantile", "wquantile")):
        raise PlanError("shares= are for the rules 'quantile' and 'wquantile', which need them")
    if shares is not None and (len(shares) != len(problem.menu) or min(shares) < 0 or not sum(shares) > 0):
        raise PlanError(f"shares has a number of at least 0 for each width of the menu {problem.menu}, got {shares}")
    if unit == "channel" and not quantizer_class(problem.style.quantizer).can_mix:
        able = sorted(name for name, known in QUANTIZERS.items() if known.can_mix)
        raise PlanError(
            f"quantizer {problem.style.quantizer!r} has one width for all channels: take one of {able}, or unit='layer'"
        )


class _Table:
    """Units with their importance, number of weights and widths to choose from."""

    def __init__(self, problem: Problem, importance: Importance, unit: str, how: str) -> None:
        self.problem, self.unit = problem, unit
        self.choices = problem.choices()
        pooled = importance.units(problem.model, unit, how)
        weights = {layer.name: layer.numel for layer in problem.shape.layers}
        self.units: Units = [(name, i) for name in self.choices for i in range(len(pooled[name]))]
        self.scores = np.array([float(pooled[name][i]) for name, i in self.units])
        self.sizes = np.array([weights[name] / len(pooled[name]) for name, _ in self.units])
        edges = edge_layers(problem.shape)
        self.free = np.array([name not in edges or problem.style.first_last is None for name, _ in self.units])

    def menus(self) -> list[tuple[int, ...]]:
        """Return the widths of each unit."""
        return [self.choices[name] for name, _ in self.units]

    def least(self, scores: Any) -> list[int]:
        """Return the widths with the least sum of scores * 4^-b within the budget."""
        costs = [[n * b for b in menu] for n, menu in zip(self.sizes, self.menus())]
        losses = [[s * 4.0**-b for b in menu] for s, menu in zip(scores, self.menus())]
        limit = self.problem.budget.limits["average_bits"]
        least = sum(min(row) for row in costs) / self.sizes.sum()
        if limit < least:
            raise BudgetError(
                f"a budget of average_bits={limit:g} cannot be met: the least possible is {least:.6g} with the menu "
                f"{self.problem.menu} and first_last={self.problem.style.first_last}"
            )
        total = limit * self.sizes.sum() * (1 + 1e-12)
        chosen = solve(costs, losses, total, tolerance=TOLERANCE, max_states=2000).choice
        return [menu[j] for menu, j in zip(self.menus(), chosen)]

    def minimax(self, importance: Importance) -> list[int]:
        """Return the widths whose largest distortion of a group, as a share of its own total, is least (2.4 D)."""
        maps = []
        for layers in importance.groups.values():
            sums = [layers[name] if self.unit == "channel" else layers[name].sum(0, keepdim=True) for name in layers]
            by_layer = dict(zip(layers, sums))
            own = np.array([float(by_layer[name][i]) for name, i in self.units])
            maps.append(own / max(own.sum(), 1e-300))
        shares, best, least = np.full(len(maps), 1 / len(maps)), None, math.inf
        for _ in range(ROUNDS):
            bits = self.least(sum(p * own for p, own in zip(shares, maps)))
            losses = np.array([float((own * 4.0 ** -np.array(bits)).sum()) for own in maps])
            if losses.max() < least:
                best, least = bits, float(losses.max())
            shares = shares * np.exp(RATE * losses / max(losses.max(), 1e-300))
            shares /= shares.sum()
        assert best is not None
        return best

    def histogram(self, shares: Sequence[float], *, by_weight: bool) -> list[int]:
        """Return the widths by rank: the menu's shares of the units, or of their weights, lowest scores first."""
        menu, free = self.problem.menu, np.flatnonzero(self.free)
        scores, sizes = self.scores[free], self.sizes[free]
        ranked = weighted_bits(scores, sizes, menu, shares) if by_weight else quantile_bits(scores, menu, shares)
        bits = [min(widths) for widths in self.menus()]  # of units that are not free the guard's
        for place, width in zip(free, ranked):
            bits[place] = width
        average = float((np.array(bits) * self.sizes).sum() / self.sizes.sum())
        limit = self.problem.budget.limits["average_bits"]
        if average > limit * (1 + 1e-9):
            raise BudgetError(f"these shares come to {average:.4g} bits a weight, above average_bits={limit:g}")
        return bits

    def plan(self, bits: list[int], told: Mapping[str, Any]) -> Plan:
        """Return the plan with these widths."""
        by_layer: dict[str, list[int]] = {}
        for (name, _), width in zip(self.units, bits):
            by_layer.setdefault(name, []).append(width)
        problem = self.problem
        widest = problem.spread({name: max(widths) for name, widths in by_layer.items()})
        made = problem.plan(widest, "fair")
        owners = {layer.name: layer.shared or layer.name for layer in problem.shape.layers}
        rules: list[Rule] = [
            (name, None if layer is None else replace(layer, weight=_mixed(layer.weight, by_layer.get(owners[name]))))
            for name, layer in made
        ]
        decided = {**made.decided_from, "predicted": problem.plan_costs(Plan(tuple(rules))), **told}
        decided["channel_average_bits"] = float(np.mean(bits))
        return Plan(tuple(rules), decided)


def _mixed(weight: TensorPlan | None, widths: list[int] | None) -> TensorPlan | None:
    """Return the plan of a weight with these widths of channels; as it is where they are all one."""
    if weight is None or widths is None or len(set(widths)) == 1:
        return weight
    return replace(weight, bits=max(widths), channel_bits=tuple(widths))


def quantile_bits(scores: Any, menu: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Return a width for each score: the lowest share of them gets the menu's first one, and so on (2.4 A)."""
    ends = np.cumsum(np.array(shares) / sum(shares))[:-1]
    borders = torch.quantile(torch.as_tensor(scores, dtype=torch.float64), torch.tensor(np.clip(ends, 0, 1)))
    return [menu[int(j)] for j in np.searchsorted(borders.numpy(), np.asarray(scores, dtype=np.float64), side="left")]


def weighted_bits(scores: Any, sizes: Any, menu: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Return a width for each score, so that each width has its share of the weights (2.4 B)."""
    scores, sizes = np.asarray(scores, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    order = np.argsort(scores, kind="stable")
    ends = np.cumsum(np.array(shares) / sum(shares))[:-1]
    middle = (np.cumsum(sizes[order]) - sizes[order] / 2) / sizes.sum()
    bits = np.empty(len(scores), dtype=int)
    bits[order] = np.array(menu)[np.searchsorted(ends, middle, side="left")]
    return [int(b) for b in bits]
