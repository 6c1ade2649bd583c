"""One option per layer under one budget: an exact solver for separable cost and distortion.

The problem is the multiple-choice knapsack: pick an option ``j`` for every layer ``i`` so that the summed
distortion is least and the summed cost stays within the budget. Three steps:

1. Lagrangian relaxation (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE
   ASSP 1988): at a multiplier ``lam`` each layer takes the option of least ``distortion + lam * cost`` on its own.
   Bisection finds the multiplier that meets the budget; its dual value is a proven lower bound.
2. Greedy fill of what the relaxation left of the budget, from below and from above it.
3. Dynamic programming over the few options that can still beat step 2: an option whose reduced cost exceeds the
   gap between the two bounds is in no better solution (Pisinger, "A minimal algorithm for the multiple-choice
   knapsack problem", EJOR 1995).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewbits.errors import BudgetError

Array = NDArray[np.float64]
Choice = NDArray[np.intp]

TINY = np.finfo(np.float64).tiny
ROUNDING = 1e-12  # relative; sums that differ by less are taken as equal


@dataclass(frozen=True)
class Solution:
    """``choice[i]`` is the option of layer ``i``. No choice within the budget has a distortion below ``bound``."""

    choice: tuple[int, ...]
    cost: float
    distortion: float
    bound: float

    @property
    def optimal(self) -> bool:
        """Whether the distortion is proven to be the least possible."""
        return self.distortion <= self.bound


@dataclass(frozen=True)
class _Relaxed:
    under: Choice  # within the budget
    over: Choice  # above the budget, unless the relaxation is met exactly
    reduced: Array  # [layers, options]: how much an option adds to the bound
    bound: float


def solve(
    cost: Sequence[ArrayLike],
    distortion: Sequence[ArrayLike],
    budget: float,
    *,
    tolerance: float = 0.0,
    max_states: int = 100_000,
) -> Solution:
    """Choose one option a layer: least summed distortion, summed cost at most ``budget``.

    cost, distortion: one row a layer, finite; rows may differ in length. Neither needs to be monotone or convex.
    tolerance: stop early once the distortion is within this fraction of the lower bound. max_states: partial
    solutions kept at a time; where more are needed the best ones stay and the answer may be short of optimal,
    which ``Solution.optimal`` tells. Raises BudgetError, naming the least cost, where the budget is below it.
    """
    c, d = _table(cost, "cost"), _table(distortion, "distortion")
    if c.shape != d.shape or not np.array_equal(np.isinf(c), np.isinf(d)):
        raise BudgetError(f"cost {c.shape} and distortion {d.shape} need rows of the same lengths")
    least = float(c.min(axis=1).sum())
    if not least <= budget:
        raise BudgetError(
            f"budget {budget:,.12g} is below the least possible cost {least:,.12g}: allow at least that much, "
            "or a menu with fewer bits"
        )
    relaxed = _relax(c, d, budget)
    tries = [_fill(c, d, budget, start) for start in (relaxed.under, _trim(c, d, budget, relaxed.over))]
    best = min(tries, key=lambda choice: _total(d, choice))
    bound = min(relaxed.bound, _total(d, best))
    if _total(d, best) - bound > tolerance * abs(bound):
        best, proven = _search(c, d, budget, relaxed, best, max_states)
        bound = _total(d, best) if proven else bound
    return Solution(tuple(best.tolist()), _total(c, best), _total(d, best), bound)


def _table(rows: Sequence[ArrayLike], what: str) -> Array:
    """Return one table [layers, options]; shorter rows are padded with infinity."""
    arrays = [np.asarray(row, dtype=np.float64).reshape(-1) for row in rows]
    if not arrays:
        raise BudgetError("there is no layer to choose for")
    for i, row in enumerate(arrays):
        if not row.size or not np.isfinite(row).all():
            raise BudgetError(f"{what} of layer {i} needs one finite number per option, got {row}")
    table = np.full((len(arrays), max(row.size for row in arrays)), np.inf)
    for padded, row in zip(table, arrays):
        padded[: row.size] = row
    return table


def _total(table: Array, choice: Choice) -> float:
    return float(table[np.arange(len(table)), choice].sum())


def _relax(c: Array, d: Array, budget: float) -> _Relaxed:
    """Bisect over the multipliers at which two options of a layer tie: the choice changes only there."""
    price = np.where(np.isfinite(c), c, 0.0)  # keeps 0 * inf away; padding stays unchosen by its distortion
    one, two = np.triu_indices(c.shape[1], 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ties = (d[:, one] - d[:, two]) / (c[:, two] - c[:, one])
    ties = np.sort(ties[np.isfinite(ties) & (ties > 0)])
    lams = np.concatenate(([0.0], ties, 2 * ties[-1:]))  # above the last tie everyone takes the cheapest option
    rows, low, high = np.arange(len(c)), -1, len(lams) - 1

    def at(lam: float) -> tuple[Array, Array, NDArray[np.bool_]]:
        value = d + lam * price
        least = value.min(axis=1, keepdims=True)
        return value, least, value <= least + ROUNDING * np.abs(least)

    while high - low > 1:
        middle = (low + high) // 2
        cheapest = np.where(at(lams[middle])[2], c, np.inf).argmin(axis=1)
        if c[rows, cheapest].sum() <= budget:
            high = middle
        else:
            low = middle
    value, least, tied = at(lams[high])
    under, over = np.where(tied, c, np.inf).argmin(axis=1), np.where(tied, c, -np.inf).argmax(axis=1)
    return _Relaxed(under, over, value - least, float(least.sum() - lams[high] * budget))


def _fill(c: Array, d: Array, budget: float, choice: Choice) -> Choice:
    """Spend what is left of the budget: always the change that lowers the distortion most per unit of cost."""
    rows, choice = np.arange(len(c)), choice.copy()
    while True:
        gain, extra = d[rows, choice][:, None] - d, c - c[rows, choice][:, None]
        fits = (gain > 0) & (extra <= budget - c[rows, choice].sum())
        if not fits.any():
            return choice
        with np.errstate(over="ignore", invalid="ignore"):  # padding, and changes that cost next to nothing
            rate = np.where(fits, gain / np.maximum(extra, TINY), -np.inf)
        row, option = divmod(int(rate.argmax()), c.shape[1])
        choice[row] = option


def _trim(c: Array, d: Array, budget: float, choice: Choice) -> Choice:
    """Come down to the budget: always the change that raises the distortion least per unit of cost needed."""
    rows, choice = np.arange(len(c)), choice.copy()
    while (excess := c[rows, choice].sum() - budget) > 0:
        loss, saving = d - d[rows, choice][:, None], c[rows, choice][:, None] - c
        with np.errstate(over="ignore"):
            rate = np.where(saving > 0, loss / np.clip(saving, TINY, excess), np.inf)
        row, option = divmod(int(rate.argmin()), c.shape[1])
        choice[row] = option
    return choice


def _search(c: Array, d: Array, budget: float, relaxed: _Relaxed, best: Choice, max_states: int) -> tuple[Choice, bool]:
    """Return the best choice, and whether that is proven.

    A state is a partial choice (cost with the cheapest rest, distortion, reduced cost); dominated ones go.
    """
    rows, top = np.arange(len(c)), _total(d, best)
    gap = (top - relaxed.bound) * (1 + 1e-9) + ROUNDING * abs(top)
    alive = relaxed.reduced <= gap
    open_rows = np.flatnonzero(alive.sum(axis=1) > 1)
    rivals = np.where(alive, relaxed.reduced, np.inf)
    rivals[rows, relaxed.under] = np.inf
    order = open_rows[np.argsort(-rivals.min(axis=1)[open_rows])]  # rows with near rivals multiply states: last
    fixed = np.setdiff1d(rows, order)
    start = c[fixed, relaxed.under[fixed]].sum() + np.where(alive, c, np.inf).min(axis=1)[order].sum()
    spent, lost = np.array([start]), np.array([d[fixed, relaxed.under[fixed]].sum()])
    reduced, proven, trail = np.zeros(1), True, []
    for row in order:
        options = np.flatnonzero(alive[row])
        prices = c[row, options]
        spent = (spent[:, None] + (prices - prices.min())).ravel()
        lost = (lost[:, None] + d[row, options]).ravel()
        reduced = (reduced[:, None] + relaxed.reduced[row, options]).ravel()
        kept = np.flatnonzero((spent <= budget) & (reduced <= gap))
        kept = _undominated(kept, spent, lost)
        if len(kept) > max_states:
            kept, proven = kept[np.argpartition(reduced[kept], max_states)[:max_states]], False
        trail.append((row, options, kept))
        spent, lost, reduced = spent[kept], lost[kept], reduced[kept]
    if not len(lost) or lost.min() >= top:
        return best, proven
    state, found = int(lost.argmin()), relaxed.under.copy()
    for row, options, kept in reversed(trail):
        state, option = divmod(int(kept[state]), len(options))
        found[row] = options[option]
    fits = _total(c, found) <= budget  # sums in another order may round across the budget
    return (found, proven) if fits else (best, False)


def _undominated(index: Choice, spent: Array, lost: Array) -> Choice:
    """Of the states in index, keep those that no cheaper state beats; sorted by cost."""
    index = index[np.lexsort((lost[index], spent[index]))]
    losses = lost[index]
    keep = np.ones(len(index), dtype=bool)
    keep[1:] = losses[1:] < np.minimum.accumulate(losses)[:-1]
    return index[keep]
