"""Allocation: which layer gets how many bits. One method a file, registered by name."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from torch import nn

from fewbits.allocate import fair, order, separable, uniform
from fewbits.allocate.budget import Budget, plan_costs
from fewbits.allocate.hessian import hessian, hessian_traces
from fewbits.allocate.importance import Importance, group_importance
from fewbits.allocate.measured import measured
from fewbits.allocate.problem import METHODS, Problem, allocator, find_method, require_takes
from fewbits.allocate.search_settings import SearchSettings
from fewbits.allocate.searched import SearchResult
from fewbits.allocate.sensitivity import fisher, weight_mse
from fewbits.allocate.sigma import sigma, sigma_fisher, sigma_search
from fewbits.allocate.solver import Solution, solve
from fewbits.allocate.style import Style
from fewbits.allocate.uniform import uniform_plan
from fewbits.cost import model_shape
from fewbits.plan import Plan

__all__ = [
    "METHODS", "Budget", "Importance", "Problem", "SearchResult", "SearchSettings", "Solution", "Style", "allocate",
    "allocator", "fair", "fisher", "group_importance", "hessian", "hessian_traces", "measured", "order", "plan_costs",
    "separable", "sigma", "sigma_fisher", "sigma_search", "solve", "uniform", "uniform_plan", "weight_mse",
]  # fmt: skip


def allocate(
    model: nn.Module,
    budget: Budget,
    *,
    method: str = "solver",
    example: Any = None,
    menu: Iterable[int] = (2, 3, 4, 6, 8),
    act_bits: int | None = None,
    first_last: int | None = 8,
    quantizer: str = "lsq",
    act_quantizer: str | None = None,
    granularity: str = "channel",
    block: int | None = None,
    range: str = "mse",
    **options: Any,
) -> Plan:
    """Return a plan for ``model`` within ``budget``; ``plan.decided_from`` tells method, budget and predicted cost.

    method: a name in ``METHODS``; options: its own arguments (solver: sensitivity, batches, loss, probes,
    seed, tolerance; random: seed; sigma: finetune, evaluate, calibration, state and fields of ``SearchSettings``).
    example: a batch (tensor, tuple or dict of arguments); a budget of bops, energy or latency needs it, and with it the
    size counts batch norms as folded, as ``pack(model, example)`` folds them. menu: weight bits to choose from. The
    rest: as of ``uniform_plan``.

    Raises PlanError for an unknown method or option (with near names) or bits, BudgetError for a budget below what
    is possible (saying the minimum), QuantizationError for a model without quantizable layers.
    """
    chosen = find_method(method, options)
    require_takes(method, budget)
    style = Style(act_bits, first_last, quantizer, act_quantizer, granularity, block, range)
    problem = Problem(model, model_shape(model, example), budget, tuple(menu), style)
    return chosen(problem, **options)


class _CallableModule(ModuleType):
    """Importing this folder puts it where ``fewbits.allocate`` names its function: so the folder is callable too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Plan:
        return allocate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
