"""Uniform allocation: the same bits everywhere, but for the first and the last layer."""

from __future__ import annotations

import dataclasses

from torch import nn

from fewbits.allocate.problem import Problem, allocator
from fewbits.allocate.style import Style, check_bits
from fewbits.cost import model_shape
from fewbits.errors import BudgetError
from fewbits.plan import WEIGHT_BITS, Plan


def uniform_plan(
    model: nn.Module,
    weight_bits: int,
    act_bits: int | None = None,
    *,
    first_last: int | None = 8,
    quantizer: str = "lsq",
    act_quantizer: str | None = None,
    granularity: str = "channel",
    block: int | None = None,
    range: str = "mse",
) -> Plan:
    """Return a plan with one rule for each quantizable layer of ``model``.

    weight_bits: 1..8. act_bits: of inputs and of attention's operands, 1..8 or 16; None is weight-only. The other
    arguments are those of ``Style``. Raises PlanError for bits outside these, and QuantizationError if the model has
    no quantizable layer.
    """
    check_bits("weight_bits", weight_bits, WEIGHT_BITS)
    style = Style(act_bits, first_last, quantizer, act_quantizer, granularity, block, range)
    shape = model_shape(model)
    told = {"method": "uniform", "weight_bits": weight_bits, **dataclasses.asdict(style)}
    return Plan(style.rules(shape, dict.fromkeys(shape.names, weight_bits)), told)


@allocator("uniform")
def uniform(problem: Problem) -> Plan:
    """Take the most bits of the menu that meet every limit. Raises BudgetError, saying the least that is possible."""
    for bits in reversed(problem.menu):
        plan = problem.plan(dict.fromkeys(problem.shape.names, bits), "uniform", weight_bits=bits)
        exceeded = problem.budget.exceeded(problem.plan_costs(plan))
        if not exceeded:
            return plan
    needs = ", ".join(
        f"{name}={limit:,.12g}, where the least possible is {cost:,.12g}" for name, (cost, limit) in exceeded.items()
    )
    raise BudgetError(
        f"no width of the menu {problem.menu} meets {needs} (with first_last={problem.style.first_last}): raise the "
        "budget, or take a lower width"
    )
