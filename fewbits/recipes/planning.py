"""From the plan section of a recipe to a plan."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewbits.allocate import Budget, Style, allocate, uniform_plan
from fewbits.cost import model_shape
from fewbits.errors import PlanError, nearest
from fewbits.layers import open_ends, quantize
from fewbits.plan import LayerPlan, Plan, layer_plan
from fewbits.recipes.schema import PlanRules, Recipe
from fewbits.tasks.classification import cross_entropy
from fewbits.tasks.data import Batch
from fewbits.tasks.language import block_rules
from fewbits.train.loop import Loss

STYLE = ("act_bits", "first_last", "quantizer", "act_quantizer", "granularity", "block", "range")


def make_plan(
    model: nn.Module, recipe: Recipe, example: Tensor, batches: Iterable[Batch], loss: Loss = cross_entropy
) -> Plan:
    """Return the plan of a recipe for a float model.

    example: one input [1, ...], on which operations are counted and folded norms are seen. batches, loss: for a method
    that measures sensitivity on data. Raises PlanError and BudgetError, as the methods do.
    """
    given = recipe.plan
    plan = _decide(model, recipe, example, batches, loss)
    plan = plan.override(*given.explicit_rules())
    outputs = _outputs(given, plan, model, example)
    plan = plan.override(*outputs)
    return replace(plan, decided_from={**plan.decided_from, "method": given.method, "seed": recipe.seed})


def check_plan(
    model: nn.Module, recipe: Recipe, example: Tensor, batches: Iterable[Batch], loss: Loss = cross_entropy
) -> None:
    """Raise what ``make_plan`` and ``quantize`` would, before anything is trained; the model stays as it is.

    Ranges are those of min-max here: no error depends on them, and the search for better ones takes seconds.
    """
    quick = recipe.model_copy(update={"plan": recipe.plan.model_copy(update={"range": "minmax"})})
    quantize(copy.deepcopy(model), make_plan(model, quick, example, batches, loss), verbose=False)


def _decide(model: nn.Module, recipe: Recipe, example: Tensor, batches: Iterable[Batch], loss: Loss) -> Plan:
    given = recipe.plan
    if given.method == "explicit":
        return Plan(())
    if given.layer is not None:
        return Plan(tuple(block_rules(model, layer_plan(given.layer))))
    if given.file is not None:
        return Plan.load(Path(given.file).expanduser())
    style = given.model_dump(include=set(STYLE))
    if recipe.budget is None:
        assert given.weight_bits is not None  # the schema has checked it
        if given.options:
            raise PlanError(f"method 'uniform' has no options, got {given.options}")
        return uniform_plan(model, given.weight_bits, **style)
    budget = Budget(**recipe.budget.model_dump())
    options: dict[str, Any] = dict(given.options)
    if options.get("sensitivity") in ("fisher", "hessian", "measured"):
        options |= {"batches": batches, "loss": loss}
    return allocate(model, budget, method=given.method, example=example, menu=given.menu, **style, **options)


def _outputs(given: PlanRules, plan: Plan, model: nn.Module, example: Tensor) -> list[tuple[str, LayerPlan | None]]:
    """Return a rule for every result that ``outputs`` names: what the plan says of the layer, and its output."""
    shape = model_shape(model, example)
    decided, known = plan.resolve(shape.names, shape.outputs), (*shape.names, *shape.outputs)
    output = Style(quantizer=given.quantizer, act_quantizer=given.act_quantizer, range=given.range).activation(
        given.output_bits
    )
    rules: list[tuple[str, LayerPlan | None]] = []
    patterns = given.outputs
    if patterns == "auto":
        patterns = open_ends(model, example, [name for name, layer in decided.items() if layer and layer.input])
    for pattern in patterns:
        hits = fnmatch.filter(known, pattern)
        if not hits:
            raise PlanError(f"plan.outputs: {pattern!r} matches no layer and no norm{nearest(pattern, known)}")
        rules += [(name, replace(decided.get(name) or LayerPlan(), output=output)) for name in hits]
    return rules
