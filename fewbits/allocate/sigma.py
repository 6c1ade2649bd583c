"""SigmaQuant (arXiv 2602.22136): bits by clusters of sigma, then moved by divergence until the targets hold.

With ``finetune`` and ``evaluate`` it is the whole search, trained and measured at each step. Without them it only
allocates: the same clusters and the same ranking, until the limits of costs hold and what is left of them is spent.
``sigma_fisher`` is the same search with Fisher information in the place of sigma and divergence; it is not the paper's.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from fewbits.allocate.budget import Budget
from fewbits.allocate.layout import Complete
from fewbits.allocate.problem import Problem, allocator
from fewbits.allocate.rankers import ByDivergence, ByFisher, Loss
from fewbits.allocate.search import Say
from fewbits.allocate.search_settings import OF_DIVERGENCE, OF_SEARCH, SearchSettings
from fewbits.allocate.searched import Functions, Ranking, SearchResult, moves_inputs, run_search, untrained
from fewbits.allocate.style import Style
from fewbits.allocate.subject import Evaluate, Finetune
from fewbits.cost import model_shape
from fewbits.errors import PlanError
from fewbits.plan import Plan

MENU = (2, 4, 6, 8)


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
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    **settings: Any,
) -> SearchResult:
    """Search the bits of each layer until the targets of ``budget`` hold; return the plan and the trained model.

    finetune: (model, epochs) trains in place. evaluate: model -> accuracy in percent, on examples that are neither
    trained on nor reported. calibration: batches of model inputs. example: as of ``allocate``. style: of the plans;
    None: inputs of 8 bits, the rest as ``Style`` has it. complete: adds to each plan. state: a folder that holds
    the search after every step; a search that was stopped goes on from there, and ends bit-equal. say: is told each
    step. loss, batches: (model, batch) -> scalar and training batches; given, start and order of the moves follow
    Fisher information (``sigma_fisher``). settings: fields of ``SearchSettings``. The given model stays as it is.

    Raises BudgetError before any work for a limit below what is possible, PlanError for settings out of range, and
    SearchError, chained, for what ``finetune`` or ``evaluate`` raise, and where the accuracy is NaN.
    """
    SearchSettings.require_known(settings)
    style = Style(act_bits=8) if style is None else style
    problem = Problem(model, model_shape(model, example), budget, tuple(menu), style)
    functions = Functions(finetune, evaluate, list(calibration))
    if (loss is None) != (batches is None):
        raise PlanError("loss= and batches= rank moves by Fisher information together: give both or neither")
    if loss is None or batches is None:
        chosen = SearchSettings(**settings)
        ranking = _by_divergence(chosen, functions.calibration)
    else:
        chosen, ranking = _fisher_settings(settings), functools.partial(ByFisher, batches=list(batches), loss=loss)
    return run_search(problem, functions, chosen, ranking, complete=complete, state=state, say=say)


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
    chosen = SearchSettings(**settings)
    if finetune is not None or evaluate is not None:
        functions = _functions(finetune, evaluate, calibration)
        return _warned(problem, functions, chosen, _by_divergence(chosen, functions.calibration), complete, state)
    idle = _idle(settings, state)
    if calibration is not None and not moves_inputs(problem, chosen):
        idle.append("calibration")
    _require_search(idle)
    if calibration is None and chosen.activations:
        raise PlanError("activations=True ranks inputs by their histograms: give calibration= batches")
    if calibration is None:  # widths of inputs cannot be ranked without data
        chosen = dataclasses.replace(chosen, activations=False)
    batches = [] if calibration is None else list(calibration)
    return untrained(problem, chosen, _by_divergence(chosen, batches), complete=complete)


@allocator("sigma_fisher", SearchSettings, holds_accuracy=True)
def sigma_fisher(
    problem: Problem,
    *,
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    finetune: Finetune | None = None,
    evaluate: Evaluate | None = None,
    calibration: Iterable[Any] | None = None,
    state: Path | str | None = None,
    complete: Complete | None = None,
    **settings: Any,
) -> Plan:
    """Choose bits as ``sigma`` does, but by the expected rise of the loss for each cost that is saved (``ByFisher``).

    loss: (model, batch) -> scalar; batches: of training examples. Errors: as of ``sigma``.
    """
    if loss is None or batches is None:
        raise PlanError("method 'sigma_fisher' needs batches= and loss=, a function (model, batch) -> scalar")
    chosen, ranking = _fisher_settings(settings), functools.partial(ByFisher, batches=list(batches), loss=loss)
    if finetune is not None or evaluate is not None:
        return _warned(problem, _functions(finetune, evaluate, calibration), chosen, ranking, complete, state)
    _require_search(_idle(settings, state) + ([] if calibration is None else ["calibration"]))
    return untrained(problem, chosen, ranking, complete=complete)


def _by_divergence(settings: SearchSettings, batches: Iterable[Any]) -> Ranking:
    return functools.partial(ByDivergence, settings=settings, batches=list(batches))


def _fisher_settings(settings: dict[str, Any]) -> SearchSettings:
    """Return the settings of a search by Fisher information. Raises PlanError for those that would not matter."""
    idle = sorted(OF_DIVERGENCE & set(settings))
    if idle:
        raise PlanError(f"{idle} are of clusters and divergence, which 'sigma_fisher' does not use: drop them")
    return SearchSettings(**settings, activations=False)


def _functions(finetune: Finetune | None, evaluate: Evaluate | None, calibration: Iterable[Any] | None) -> Functions:
    if finetune is None or evaluate is None or calibration is None:
        raise PlanError(
            "a search needs all three of finetune=, evaluate= and calibration=; without any it only allocates"
        )
    return Functions(finetune, evaluate, list(calibration))


def _idle(settings: dict[str, Any], state: Path | str | None) -> list[str]:
    return sorted(OF_SEARCH & set(settings)) + ([] if state is None else ["state"])


def _require_search(idle: list[str]) -> None:
    if idle:
        raise PlanError(f"{idle} are for a search that trains: give finetune= and evaluate= too, or drop them")


def _warned(
    problem: Problem,
    functions: Functions,
    settings: SearchSettings,
    ranking: Ranking,
    complete: Complete | None,
    state: Path | str | None,
) -> Plan:
    """Return the plan of a search, and warn of the targets that it misses."""
    found = run_search(problem, functions, settings, ranking, complete=complete, state=state)
    if found.missed:
        warnings.warn(found.message, stacklevel=4)
    return found.plan
