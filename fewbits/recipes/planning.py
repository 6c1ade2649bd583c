"""From the plan section of a recipe to a plan."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewbits.allocate import Budget, Style, allocate, uniform_plan
from fewbits.allocate.layout import Complete
from fewbits.allocate.problem import METHODS, known_options
from fewbits.cost import model_shape
from fewbits.errors import PlanError, nearest
from fewbits.layers import open_ends, quantize
from fewbits.layers.signs import signed_inputs
from fewbits.plan import LayerPlan, Plan, layer_plan
from fewbits.quantizers.pact import NEGATIVE
from fewbits.recipes.schema import PlanRules, Recipe
from fewbits.tasks.classification import cross_entropy
from fewbits.tasks.data import Batch
from fewbits.tasks.language import block_rules
from fewbits.tasks.open_vocabulary.policy import parse_policy, policy_4_4_8
from fewbits.train.loop import Loss

Groups = Callable[[], Mapping[str, Iterable[Batch]]]
GRANULARITY = "act_granularity"
STYLE = ("act_bits", "first_last", "quantizer", "act_quantizer", "granularity", "block", "range")


def make_plan(
    model: nn.Module,
    recipe: Recipe,
    example: Tensor,
    batches: Iterable[Batch],
    loss: Loss = cross_entropy,
    groups: Groups | None = None,
) -> Plan:
    """Return the plan of a recipe for a float model.

    example: one input [1, ...], on which operations are counted and folded norms are seen. batches, loss: for a method
    that measures sensitivity on data. groups: returns batches by group, for one that measures
    it on them. Raises PlanError and BudgetError, as the methods do.
    """
    complete = completion(model, recipe, example)
    plan = _decide(model, recipe, example, batches, loss, complete, groups)
    return told(plan if _completes(recipe.plan.method) else complete(plan), recipe)


def _completes(method: str) -> bool:
    """Tell whether a method itself completes the plans that it weighs."""
    return method in METHODS and "complete" in known_options(method)


def told(plan: Plan, recipe: Recipe) -> Plan:
    """Return the plan with what else of the recipe decided it."""
    return replace(plan, decided_from={**plan.decided_from, "method": recipe.plan.method, "seed": recipe.seed})


def completion(model: nn.Module, recipe: Recipe, example: Tensor) -> Complete:
    """Return the function that adds to any plan the rules and the quantized results that the recipe names."""
    given, shape = recipe.plan, model_shape(model, example)
    rules, ends = given.explicit_rules(), dict[tuple[str, ...], list[str]]()
    signed = signed_inputs(model, example, NEGATIVE) if given.act_quantizer == "pact" else []

    def complete(plan: Plan) -> Plan:
        plan = plan.override(*_mirrored(plan.resolve(shape.names, shape.outputs), signed), *rules)
        decided, patterns = plan.resolve(shape.names, shape.outputs), given.outputs
        if patterns == "auto":
            inputs = tuple(name for name, layer in decided.items() if layer and layer.input)
            if inputs not in ends:  # a forward, but the widths do not matter to it
                ends[inputs] = open_ends(model, example, inputs)
            patterns = ends[inputs]
        return plan.override(*_outputs(given, decided, patterns, (*shape.names, *shape.outputs)))

    return complete


def _mirrored(decided: Mapping[str, LayerPlan | None], signed: Sequence[str]) -> list[tuple[str, LayerPlan | None]]:
    """Return a rule for each layer whose signed input "pact" would cut at zero: symmetric there."""
    rules: list[tuple[str, LayerPlan | None]] = []
    for name in signed:
        layer = decided.get(name)
        given = None if layer is None else layer.input
        if layer is not None and given is not None and given.quantizer == "pact" and given.bits > 1:
            rules.append((name, replace(layer, input=replace(given, symmetric=True))))
    return rules


def needs_loss(method: str) -> bool:
    """Tell whether a method always measures on data, not by one of its options."""
    known = known_options(method) if method in METHODS else []
    return "loss" in known and "sensitivity" not in known


def check_plan(
    model: nn.Module,
    recipe: Recipe,
    example: Tensor,
    batches: Iterable[Batch],
    loss: Loss = cross_entropy,
    groups: Groups | None = None,
) -> None:
    """Raise what ``make_plan`` and ``quantize`` would, before anything is trained; the model stays as it is.

    Ranges are those of min-max here: no error depends on them, and the search for better ones takes seconds.
    """
    changes: dict[str, Any] = {"plan": recipe.plan.model_copy(update={"range": "minmax"})}
    if recipe.search is not None and recipe.budget is not None:  # its limits; what is trained shows later
        floors = {"accuracy": None, "accuracy_drop": None, "reference": None}
        budget = recipe.budget.model_copy(update=floors)
        if not budget.model_dump(exclude_none=True):
            budget = budget.model_copy(update={"average_bits": 8.0})
        changes |= {"budget": budget, "search": None}
    quick = recipe.model_copy(update=changes)
    trial = quantize(copy.deepcopy(model), make_plan(model, quick, example, batches, loss, groups), verbose=False)
    if recipe.curriculum is not None:
        recipe.curriculum.settings().check(trial)


def _decide(
    model: nn.Module,
    recipe: Recipe,
    example: Tensor,
    batches: Iterable[Batch],
    loss: Loss,
    complete: Complete,
    groups: Groups | None,
) -> Plan:
    given = recipe.plan
    if given.method == "explicit":
        return Plan(())
    if given.layer is not None:
        return Plan(tuple(block_rules(model, layer_plan(given.layer))))
    if given.policy is not None:
        return _by_policy(model, given, example)
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
    if "groups" in known_options(given.method):
        options |= {"groups": None if groups is None else groups(), "loss": loss}
    elif options.get("sensitivity") in ("fisher", "hessian", "measured") or needs_loss(given.method):
        options |= {"batches": batches, "loss": loss}
    if _completes(given.method):
        options["complete"] = complete
    return allocate(model, budget, method=given.method, example=example, menu=given.menu, **style, **options)


def _by_policy(model: nn.Module, given: PlanRules, example: Tensor) -> Plan:
    """Return the plan of a policy W-A-Att, layer by layer. Raises PlanError for an unknown option."""
    assert given.policy is not None
    if unknown := [name for name in given.options if name != GRANULARITY]:
        raise PlanError(f"method 'policy' has no option {unknown[0]!r}; known: {GRANULARITY}: tensor or channel")
    plan = policy_4_4_8(model, *parse_policy(given.policy), **given.options)
    return replace(plan, rules=tuple(model_shape(model, example).resolve(plan).items()))


def _outputs(
    given: PlanRules, decided: Mapping[str, LayerPlan | None], patterns: Iterable[str], known: Sequence[str]
) -> list[tuple[str, LayerPlan | None]]:
    """Return a rule for every result that ``patterns`` name: what was decided of the layer, and its output."""
    output = Style(quantizer=given.quantizer, act_quantizer=given.act_quantizer, range=given.range).activation(
        given.output_bits
    )
    rules: list[tuple[str, LayerPlan | None]] = []
    for pattern in patterns:
        hits = fnmatch.filter(known, pattern)
        if not hits:
            raise PlanError(f"plan.outputs: {pattern!r} matches no layer and no norm{nearest(pattern, known)}")
        rules += [(name, replace(decided.get(name) or LayerPlan(), output=output)) for name in hits]
    return rules
