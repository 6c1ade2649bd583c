"""Balanced fusion and attention alignment in a run (Q2): what is checked first, the loss, and the fold afterwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.allocate import uniform_plan
from fewbits.deploy import fold_and_measure, fold_fusion
from fewbits.errors import RecipeError
from fewbits.layers import BalancedFusion, balance_fusion, calibrate, fusion_nodes, in_eval, quantize
from fewbits.losses import Taps
from fewbits.recipes.schema import Alignment, Fusion, Recipe
from fewbits.train.loop import Loss

Batches = Iterable[Tensor]


def check_fusion(model: nn.Module, recipe: Recipe, example: Tensor) -> None:
    """Raise PlanError or TrainingError for nodes or taps that the float model does not have, or has no use for."""
    trial = copy.deepcopy(model)
    if recipe.fusion is not None:
        balance_fusion(trial, example, recipe.fusion.nodes, recipe.fusion.settings())
    if recipe.alignment is not None:
        taps = Taps(trial, copy.deepcopy(model), recipe.alignment.taps)
        calibrate(quantize(trial, uniform_plan(trial, 8, 8), verbose=False), [example])
        with taps, in_eval(trial), torch.no_grad():  # whatever the plan will be: is there a quantizer behind each?
            trial(example)
            taps.teach(example)
        taps.features()


def require_foldable(model: nn.Module, rules: Fusion, batches: Batches) -> None:
    """Raise RecipeError, naming nodes and reasons, where a calibrated model could not be folded after its training."""
    kept = {n: why for n, why in fold_fusion(copy.deepcopy(model), batches, rules.fold).items() if why[:4] == "kept"}
    moving = [n for n, node in fusion_nodes(model).items() if node.op == "add" and _gains_part(node)]
    kept |= dict.fromkeys(moving, "kept: an add whose gains will be unequal")
    if kept:
        raise RecipeError(
            f"fusion.fold {rules.fold} cannot fold {kept}: take a static plan.act_quantizer such as lsq or pact, "
            "another fold, or other fusion.nodes (an add folds with equal gains only)"
        )


def _gains_part(node: BalancedFusion) -> bool:
    """Tell whether training drives the gains of an add apart: its branches' own gradients never do."""
    given = node.settings
    return given.mode == "learned" or (
        given.mode == "controller" and (given.measure == "inputs" or any(given.tau or ()))
    )


def fold(
    model: nn.Module, rules: Fusion, batches: Batches, evaluate: Callable[[nn.Module], Mapping[str, Any]]
) -> dict[str, Any]:
    """Fold the nodes away, in place; return metrics before and after, and of each node what it came to."""
    nodes = {name: _told(node) for name, node in fusion_nodes(model).items()}
    report = fold_and_measure(model, list(batches), evaluate, how=rules.fold)
    return {
        "forms": {
            "true norm": dict(report.true_norm),
            "constant norm": dict(report.constant_norm),
            "folded": dict(report.folded),
        },
        "nodes": [{"name": name, **told, "folded": report.nodes[name]} for name, told in nodes.items()],
    }


def _told(node: BalancedFusion) -> dict[str, Any]:
    gains = [float(g) for g in node.gains.detach()]
    return {"branches": list(node.branches), "gains": gains, "log_ratio": node.log_ratio()}


def alignment_weight(loss: Loss, student: nn.Module, teacher: nn.Module, rules: Alignment, batch: Any) -> float:
    """Return the weight at which the alignment's gradient is ``rules.ratio`` of the task's, at the tapped features.

    Raises RecipeError where one of them has no gradient there.
    """
    assert rules.ratio is not None
    given, trial = rules.settings(), copy.deepcopy(student).train()  # a copy: batch norms take note of what they see
    with Taps(trial, copy.deepcopy(teacher), rules.taps) as taps:
        task = loss(trial, batch)
        taps.teach(batch[0])
        found = taps.gradient_ratio(taps.loss(given), task)
    if not 0 < found < math.inf:
        raise RecipeError(f"alignment.ratio: the gradients at {rules.taps} are in no ratio ({found:g}); give a weight")
    weight: float = given.weight * rules.ratio / found
    return weight


def aligned(loss: Loss, student: nn.Module, teacher: nn.Module, rules: Alignment) -> Loss:
    """Return the loss of the task plus that of attention maps beside the float model's."""
    alignment = rules.settings()
    taps = Taps(student, teacher, rules.taps)

    def total(model: nn.Module, batch: Any) -> Tensor:
        with taps:
            task = loss(model, batch)
            taps.teacher.to(task.device)
            taps.teach(batch[0])
            return task + taps.loss(alignment)

    return total
