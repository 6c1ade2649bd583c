"""SigmaQuant (arXiv 2602.22136): bits by clusters of sigma, then moved by divergence until the targets hold.

With ``finetune`` and ``evaluate`` it is the whole search, trained and measured at each step. Without them it only
allocates: the same clusters and the same ranking, until the limits of costs hold and what is left of them is spent.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fewbits.allocate.budget import Budget
from fewbits.allocate.layout import Complete, Layout
from fewbits.allocate.problem import Problem, allocator
from fewbits.allocate.rank import divergences, item_sigmas, ranked, sample_inputs
from fewbits.allocate.search import Say, Search, clustered
from fewbits.allocate.search_settings import OF_SEARCH, SearchSettings
from fewbits.allocate.search_state import SearchFolder
from fewbits.allocate.style import Style
from fewbits.allocate.subject import Evaluate, Finetune, Subject
from fewbits.allocate.two_bit import ternary
from fewbits.cost import model_shape
from fewbits.errors import BudgetError, PlanError
from fewbits.plan import Plan

MENU = (2, 4, 6, 8)


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


def sigma_search(
    model: nn.Module,
    budget: Budget,
    finetune: Finetune,
    evaluate: Evaluate,
    calibration: Iterable[Any],
    *,
    example: Any = None,
    menu: Iterable[int] = MENU,
    style: Style | None = None,
    complete: Complete | None = None,
    state: Path | str | None = None,
    say: Say | None = None,
    **settings: Any,
) -> SearchResult:
    """Search the bits of each layer until the targets of ``budget`` hold; return the plan and the trained model.

    finetune: (model, epochs) trains in place. evaluate: model -> accuracy in percent, on examples that are neither
    trained on nor reported. calibration: batches of model inputs. example: as of ``allocate``. style: of the plans;
    None: inputs of 8 bits, the rest as ``Style`` has it. complete: adds to each plan. state: a folder that holds
    the search after every step; a search that was stopped goes on from there, and ends bit-equal. say: is told each
    step. settings: fields of ``SearchSettings``. The given model stays as it is.

    Raises BudgetError before any work for a limit below what is possible, PlanError for settings out of range, and
    SearchError, chained, for what ``finetune`` or ``evaluate`` raise, and where the accuracy is NaN.
    """
    style = Style(act_bits=8) if style is None else style
    problem = Problem(model, model_shape(model, example), budget, tuple(menu), style)
    return _search(problem, (finetune, evaluate, calibration), SearchSettings(**settings), complete, state, say)


def _search(
    problem: Problem,
    functions: tuple[Finetune, Evaluate, Iterable[Any]],
    chosen: SearchSettings,
    complete: Complete | None,
    state: Path | str | None,
    say: Say | None,
) -> SearchResult:
    problem = dataclasses.replace(problem, style=ternary(problem.style, chosen.scale2))
    layout, budget = _layout(problem, chosen, complete), problem.budget
    finetune, evaluate, calibration = functions
    subject = Subject(problem.model, layout, finetune, evaluate, list(calibration))
    given = {"style": dataclasses.asdict(problem.style), "menu": list(problem.menu)}
    search = Search(subject, layout, chosen, SearchFolder(state), given, say)
    done = search.run()
    assert done.stable is not None and done.status is not None
    mark, goal = done.stable, search.goal
    items = _items(search)
    buffers = {"accuracy": chosen.accuracy_buffer, **goal.buffers}
    log = {
        "targets": {**budget.targets, "floor": goal.floor},
        "buffers": buffers,
        "settings": chosen.to_dict(),
        "accuracies": done.accuracies,
        "int8_costs": search.int8_costs,
        "items": items,
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
        "settings": chosen.to_dict(),
    }
    plan = _told(layout, mark.bits, told)
    return SearchResult(plan, subject.model, done.status, mark.accuracy, mark.costs, missed, log)


def _items(search: Search) -> list[dict[str, Any]]:
    """Return what the search knew of each item in float: sigma, cluster (by its bits), divergence by mode and bits."""
    first = clustered(search.layout, search.sigmas, search.settings.penalty, search.settings)
    found = divergences(search.layout.problem.model, search.items, search.inputs)
    return [
        {
            "layer": item.layer,
            "kind": item.kind,
            "choices": list(item.choices),
            "sigma": search.sigmas[i],
            "cluster": first[i],
            "divergence": {mode: {str(b): d for b, d in rows[i].items()} for mode, rows in found.items()},
        }
        for i, item in enumerate(search.items)
    ]


@allocator("sigma", SearchSettings, holds_accuracy=True)
def sigma(
    problem: Problem,
    *,
    finetune: Finetune | None = None,
    evaluate: Evaluate | None = None,
    calibration: Iterable[Any] | None = None,
    state: Path | str | None = None,
    complete: Complete | None = None,
    **settings: Any,
) -> Plan:
    """Choose bits by sigma and divergence: with ``finetune`` and ``evaluate`` as ``sigma_search``, else untrained.

    ``decided_from`` tells the status; where a target is missed it is warned of too. Raises BudgetError for a limit
    below what is possible, and for an accuracy without the functions that train and measure it.
    """
    if finetune is None and evaluate is None:
        chosen = SearchSettings(**settings)
        idle = sorted(OF_SEARCH & set(settings)) + ([] if state is None else ["state"])
        if calibration is not None and not _moves_inputs(problem, chosen):
            idle.append("calibration")
        if idle:
            raise PlanError(f"{idle} are for a search that trains: give finetune= and evaluate= too, or drop them")
        return _untrained(problem, chosen, calibration, complete)
    if finetune is None or evaluate is None or calibration is None:
        raise PlanError(
            "a search needs all three of finetune=, evaluate= and calibration=; without any it only allocates"
        )
    functions = finetune, evaluate, calibration
    found = _search(problem, functions, SearchSettings(**settings), complete, state, None)
    if found.missed:
        warnings.warn(found.message, stacklevel=3)
    return found.plan


def _layout(problem: Problem, settings: SearchSettings, complete: Complete | None) -> Layout:
    """Return the items of a search. Raises BudgetError, before any work, for a limit below what is possible."""
    layout = Layout(problem, activations=_moves_inputs(problem, settings), complete=complete)
    layout.require_possible()
    return layout


def _moves_inputs(problem: Problem, settings: SearchSettings) -> bool:
    if settings.activations is None:
        return "bops" in problem.budget.limits and problem.style.act_bits is not None
    return settings.activations


def _untrained(
    problem: Problem, settings: SearchSettings, calibration: Iterable[Any] | None, complete: Complete | None
) -> Plan:
    """Cluster, lower the least scores until the limits hold, then raise the largest that still fit."""
    if problem.budget.floors:
        raise BudgetError(
            f"{problem.budget.floors} can only be held by a search that trains and measures: give finetune=, evaluate= "
            "and calibration=, or a limit of costs alone"
        )
    problem = dataclasses.replace(problem, style=ternary(problem.style, settings.scale2))
    batches = None if calibration is None else list(calibration)
    if batches is None and settings.activations is None:  # widths of inputs cannot be ranked without data
        settings = dataclasses.replace(settings, activations=False)
    if batches is None and settings.activations:
        raise PlanError("activations=True ranks inputs by their histograms: give calibration= batches")
    layout = _layout(problem, settings, complete)
    items, model = layout.items, problem.model
    inputs = [item.layer for item in items if item.kind == "input"]
    samples: Mapping[str, Any] = sample_inputs(model, inputs, batches or []) if inputs else {}
    sigmas = item_sigmas(model, items, samples)
    found = divergences(model, items, samples, (settings.kl,))[settings.kl]
    bits, moves, spent = clustered(layout, sigmas, settings.penalty, settings), 0, False

    def order() -> list[int]:
        return ranked(found, items, bits, up=spent, rank=settings.rank, alpha=settings.alpha, sigmas=sigmas)

    while problem.budget.exceeded(layout.costs(bits)):
        bits, moves = _moved(layout, bits, order()[0], up=False), moves + 1
    spent, full = True, set[int]()  # what does not fit now never will: raising only costs
    while left := [i for i in order() if i not in full]:
        trial = _moved(layout, bits, left[0], up=True)
        if problem.budget.exceeded(layout.costs(trial)):
            full.add(left[0])
        else:
            bits, moves = trial, moves + 1
    told = {"status": "untrained", "moves": moves, "settings": settings.to_dict()}
    return _told(layout, bits, told)


def _moved(layout: Layout, bits: list[int], index: int, *, up: bool) -> list[int]:
    step = layout.items[index].step(bits[index], up)
    assert step is not None
    return [*bits[:index], step, *bits[index + 1 :]]


def _told(layout: Layout, bits: list[int], told: Mapping[str, Any]) -> Plan:
    """Return the plan with what it was decided from."""
    problem = layout.problem
    about = {
        "method": "sigma",
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
