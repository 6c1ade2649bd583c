"""From a problem to a search and its result, and the same without training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fewbits.allocate.layout import INT8, Complete, Layout
from fewbits.allocate.problem import Problem
from fewbits.allocate.rank import divergences
from fewbits.allocate.rankers import Ranker, meet_limits
from fewbits.allocate.search import Say, Search
from fewbits.allocate.search_settings import SearchSettings
from fewbits.allocate.search_state import SearchFolder
from fewbits.allocate.subject import Evaluate, Finetune, Subject
from fewbits.allocate.two_bit import ternary
from fewbits.errors import BudgetError
from fewbits.plan import Plan

Ranking = Callable[[Layout], Ranker]


@dataclass(frozen=True)
class SearchResult:
    """plan, and the trained model with it. status: "ok" where every target holds, else why the search ended (abandon,
    exhausted, max_steps); the plan is then the nearest one. missed: {target: {value, target, distance}} of each target
    that does not hold. accuracy: percent, costs: by name. log: items, targets and every step, as plain data.
    """

    plan: Plan
    model: nn.Module
    status: str
    accuracy: float
    costs: dict[str, float]
    missed: dict[str, dict[str, float]]
    log: dict[str, Any]

    @property
    def message(self) -> str:
        """One line: the status, and which target is out of reach by how much."""
        return _message(self.status, self.missed)


@dataclass(frozen=True)
class Functions:
    """What trains and measures, see ``sigma_search``."""

    finetune: Finetune
    evaluate: Evaluate
    calibration: Iterable[Any]


def run_search(
    problem: Problem,
    functions: Functions,
    settings: SearchSettings,
    ranking: Ranking,
    *,
    complete: Complete | None = None,
    state: Path | str | None = None,
    say: Say | None = None,
) -> SearchResult:
    """Search, see ``sigma_search``. ranking: what decides the order of moves."""
    layout = make_layout(problem, settings, complete)
    subject = Subject(problem.model, layout, functions.finetune, functions.evaluate, list(functions.calibration))
    ranker, problem = ranking(layout), layout.problem
    given = {"method": ranker.name, "style": dataclasses.asdict(problem.style), "menu": list(problem.menu)}
    search = Search(subject, layout, ranker, settings, SearchFolder(state), given, say)
    done = search.run()
    assert done.stable is not None and done.status is not None
    mark, goal = done.stable, search.goal
    log = {
        "method": ranker.name,
        "targets": {**problem.budget.targets, "floor": goal.floor},
        "buffers": {"accuracy": settings.accuracy_buffer, **goal.buffers},
        "settings": settings.to_dict(),
        "accuracies": done.accuracies,
        "int8_costs": search.int8_costs,
        "items": _items(search),
        "steps": done.log,
        "status": done.status,
        "epochs": sum(entry["epochs"] for entry in done.log),
        "seconds": sum(entry["seconds"] for entry in done.log),
    }
    missed = goal.missed(mark.accuracy, mark.costs)
    told = {
        "status": done.status,
        "message": _message(done.status, missed),
        "accuracy": mark.accuracy,
        "accuracies": done.accuracies,
        "missed": missed,
        "steps": len(done.log),
        "epochs": log["epochs"],
        "settings": settings.to_dict(),
    }
    plan = _told(layout, ranker, mark.bits, told)
    return SearchResult(plan, subject.model, done.status, mark.accuracy, mark.costs, missed, log)


def untrained(
    problem: Problem, settings: SearchSettings, ranking: Ranking, *, complete: Complete | None = None
) -> Plan:
    """Start as a search would, then move until the limits hold and are spent. Raises BudgetError for a floor."""
    if problem.budget.floors:
        raise BudgetError(
            f"{problem.budget.floors} can only be held by a search that trains and measures: give finetune=, evaluate= "
            "and calibration=, or a limit of costs alone"
        )
    layout = make_layout(problem, settings, complete)
    ranker = ranking(layout)
    ranker.look(problem.model)
    bits, moves = meet_limits(layout, ranker, ranker.start(settings.penalty))
    return _told(layout, ranker, bits, {"status": "untrained", "moves": moves, "settings": settings.to_dict()})


def make_layout(problem: Problem, settings: SearchSettings, complete: Complete | None) -> Layout:
    """Return the items of a search.

    Raises BudgetError, before any work, for a limit below what is possible, and for a drop of the accuracy against
    INT8 with a menu that has no 8 bits.
    """
    budget = problem.budget
    if budget.accuracy_drop is not None and budget.reference != "fp32" and problem.menu[-1] < INT8:
        raise BudgetError(
            f"accuracy_drop={budget.accuracy_drop} counts from the model with 8 bits everywhere, which the menu "
            f"{problem.menu} does not allow: add 8 to it, or give reference='fp32', or accuracy= instead"
        )
    problem = dataclasses.replace(problem, style=ternary(problem.style, settings.scale2))
    layout = Layout(problem, activations=moves_inputs(problem, settings), complete=complete)
    layout.require_possible()
    return layout


def moves_inputs(problem: Problem, settings: SearchSettings) -> bool:
    """Tell whether widths of inputs are searched."""
    if settings.activations is None:
        return "bops" in problem.budget.limits and problem.style.act_bits is not None
    return settings.activations


def _items(search: Search) -> list[dict[str, Any]]:
    """Return what the search knew of each item in float: sigma, cluster (by its bits), divergence by mode and bits."""
    first: dict[str, int] = next((entry["bits"] for entry in search.state.log if entry["phase"] == "cluster"), {})
    found = divergences(search.layout.problem.model, search.items, search.ranker.inputs)
    names = search.layout.named(search.layout.at(0))
    return [
        {
            "layer": item.layer,
            "kind": item.kind,
            "choices": list(item.choices),
            "sigma": search.ranker.sigmas[i],
            "cluster": first.get(name),
            "divergence": {mode: {str(b): d for b, d in rows[i].items()} for mode, rows in found.items()},
        }
        for i, (item, name) in enumerate(zip(search.items, names))
    ]


def _told(layout: Layout, ranker: Ranker, bits: list[int], told: Mapping[str, Any]) -> Plan:
    """Return the plan with what it was decided from."""
    problem = layout.problem
    about = {
        "method": ranker.name,
        "budget": problem.budget.targets,
        "predicted": layout.costs(bits),
        "menu": list(problem.menu),
    }
    return dataclasses.replace(layout.plan(bits), decided_from=about | dict(told))


def _message(status: str, missed: Mapping[str, Mapping[str, float]]) -> str:
    if not missed:
        return f"{status}: every target holds"
    off = "; ".join(
        f"{name} is {found['value']:,.6g}, {found['distance']:,.4g} "
        f"{'below' if name == 'accuracy' else 'above'} the target {found['target']:,.6g}"
        for name, found in missed.items()
    )
    return f"{status}: out of reach: {off}"
