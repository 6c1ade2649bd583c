"""Allocation by the exact solver: least summed distortion under one limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from fewbits.allocate.hessian import hessian
from fewbits.allocate.measured import measured
from fewbits.allocate.problem import Problem, allocator
from fewbits.allocate.sensitivity import fisher, style_error, weight_mse
from fewbits.allocate.solver import solve
from fewbits.errors import BudgetError, PlanError, nearest
from fewbits.plan import Plan

SENSITIVITIES: dict[str, Callable[..., dict[str, list[float]]]] = {
    "mse": weight_mse, "fisher": fisher, "hessian": hessian, "measured": measured,
}  # fmt: skip


@allocator("solver")
def separable(
    problem: Problem,
    *,
    sensitivity: str = "mse",
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    probes: int | None = None,
    seed: int | None = None,
    tolerance: float = 0.0,
) -> Plan:
    """Choose bits per layer: least summed distortion, as if layers did not influence one another.

    sensitivity: "mse", relative squared error of the weights; or a rise of the loss, which needs ``batches`` and
    ``loss(model, batch)``: "fisher", expected from squared gradients; "hessian", expected from the mean curvature of
    each layer, with its own ``probes`` and ``seed``; "measured", with each layer alone at each width. tolerance: as of
    ``solve``. Raises BudgetError, saying the least that is possible, for a budget below it.
    """
    limits = list(problem.budget.limits)
    if len(limits) != 1:
        raise BudgetError(f"method 'solver' takes one limit, got {limits}: give one of them, or method='uniform'")
    choices = problem.choices()
    if not choices:
        raise PlanError("method 'solver' chooses bits of weights, and no layer of this model has one of its own")
    distortion = _distortion(problem, sensitivity, batches=batches, loss=loss, probes=probes, seed=seed)
    costs, left = problem.costs(limits[0])
    require_possible(problem, costs, left, limits[0])
    solution = solve(list(costs.values()), [distortion[owner] for owner in costs], left, tolerance=tolerance)
    bits = {owner: choices[owner][j] for owner, j in zip(costs, solution.choice)}
    told = {"sensitivity": sensitivity, "distortion": solution.distortion, "bound": solution.bound}
    return problem.plan(problem.spread(bits), "solver", **told)


def _distortion(problem: Problem, sensitivity: str, **given: Any) -> dict[str, list[float]]:
    """Return the distortion of every choice by owner; ``given`` is checked against what the sensitivity takes."""
    if sensitivity not in SENSITIVITIES:
        hint = nearest(sensitivity, SENSITIVITIES)
        raise PlanError(f"unknown sensitivity {sensitivity!r}{hint}; known: {tuple(SENSITIVITIES)}")
    menu, error = problem.choices(), style_error(problem.style)
    given = {name: value for name, value in given.items() if value is not None}
    if sensitivity == "mse":
        if given:
            raise PlanError(f"sensitivity 'mse' looks at weights alone: drop {list(given)}, or take 'fisher'")
        return weight_mse(problem.model, menu, quantize_error=error)
    batches, loss = given.pop("batches", None), given.pop("loss", None)
    if batches is None or loss is None:
        raise PlanError(f"sensitivity {sensitivity!r} needs batches= and loss=, a function (model, batch) -> scalar")
    if given and sensitivity != "hessian":
        raise PlanError(f"sensitivity {sensitivity!r} draws nothing by chance: drop {list(given)}, or take 'hessian'")
    return SENSITIVITIES[sensitivity](problem.model, batches, loss, menu, quantize_error=error, **given)


def require_possible(problem: Problem, costs: dict[str, list[float]], left: float, limit: str) -> None:
    """Raise BudgetError, saying the least that is possible, for a limit that the cheapest choices do not meet.

    costs, left: as of ``Problem.costs``.
    """
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
