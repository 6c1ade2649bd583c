"""Allocation by the exact solver: least summed distortion under one limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from fewbits.allocate.problem import Problem, allocator
from fewbits.allocate.sensitivity import fisher, style_error, weight_mse
from fewbits.allocate.solver import solve
from fewbits.errors import BudgetError, PlanError, nearest
from fewbits.plan import Plan

SENSITIVITIES = ("mse", "fisher")


@allocator("solver")
def separable(
    problem: Problem,
    *,
    sensitivity: str = "mse",
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    tolerance: float = 0.0,
) -> Plan:
    """Choose bits per layer: least summed distortion, as if layers did not influence one another.

    sensitivity: "mse", relative squared error of the weights; or "fisher", expected rise of the loss, which needs
    ``batches`` and ``loss(model, batch)``. tolerance: as of ``solve``. Raises BudgetError, saying the least that is
    possible, for a budget below it.
    """
    limits = list(problem.budget.limits)
    if len(limits) != 1:
        raise BudgetError(f"method 'solver' takes one limit, got {limits}: give one of them, or method='uniform'")
    choices = problem.choices()
    if not choices:
        raise PlanError("method 'solver' chooses bits of weights, and no layer of this model has one of its own")
    distortion = _distortion(problem, sensitivity, batches, loss)
    costs, left = problem.costs(limits[0])
    _require_possible(problem, costs, left, limits[0])
    solution = solve(list(costs.values()), [distortion[owner] for owner in costs], left, tolerance=tolerance)
    bits = {owner: choices[owner][j] for owner, j in zip(costs, solution.choice)}
    told = {"sensitivity": sensitivity, "distortion": solution.distortion, "bound": solution.bound}
    return problem.plan(problem.spread(bits), "solver", **told)


def _distortion(
    problem: Problem,
    sensitivity: str,
    batches: Iterable[Any] | None,
    loss: Callable[[nn.Module, Any], Tensor] | None,
) -> dict[str, list[float]]:
    menu, error = problem.choices(), style_error(problem.style)
    given = [name for name, value in (("batches", batches), ("loss", loss)) if value is not None]
    if sensitivity == "mse":
        if given:
            raise PlanError(f"sensitivity 'mse' looks at weights alone: drop {given}, or take 'fisher'")
        return weight_mse(problem.model, menu, quantize_error=error)
    if sensitivity == "fisher":
        if batches is None or loss is None:
            raise PlanError("sensitivity 'fisher' needs batches= and loss=, a function (model, batch) -> scalar")
        return fisher(problem.model, batches, loss, menu, quantize_error=error)
    hint = nearest(sensitivity, SENSITIVITIES)
    raise PlanError(f"unknown sensitivity {sensitivity!r}{hint}; known: {SENSITIVITIES}")


def _require_possible(problem: Problem, costs: dict[str, list[float]], left: float, limit: str) -> None:
    short = sum(min(options) for options in costs.values()) - left
    if short > 0:
        asked = problem.budget.limits[limit]
        least = asked + short / problem.unit(limit)
        edge = problem.style.first_last
        ends = "" if edge is None else f" and first_last={edge}"
        raise BudgetError(
            f"a budget of {limit}={asked:,.12g} cannot be met: the least possible is {least:,.12g} with the menu "
            f"{problem.menu}{ends}; raise the budget, or take a lower width"
        )
