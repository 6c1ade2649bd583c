"""The curriculum of a recipe, for its qat."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fewbits.errors import RecipeError, nearest
from fewbits.recipes.schema import Recipe
from fewbits.recipes.task import Task
from fewbits.train import Batches, Staged
from fewbits.train.start import steps_per_epoch


def check_terms(recipe: Recipe, task: Task[Any]) -> None:
    """Raise RecipeError for a term of distillation that the task does not have."""
    stages = () if recipe.curriculum is None else recipe.curriculum.stages
    for name in (name for stage in stages for name in stage.distill):
        if name not in task.terms:
            known = f"known: {list(task.terms)}" if task.terms else f"the task {recipe.task} has none"
            raise RecipeError(f"curriculum: no distillation term {name!r}{nearest(name, task.terms)}; {known}")


def check_stages(recipe: Recipe, task: Task[Any]) -> None:
    """Raise TrainingError, before anything is trained, where a stage would have no step."""
    if recipe.curriculum is not None and recipe.qat is not None:
        config = recipe.qat.fit_config(recipe.seed)
        batches = Batches(task.train, recipe.qat.batch_size)
        recipe.curriculum.settings().ends(config.total_steps(steps_per_epoch(batches, config)))


def stages_of(recipe: Recipe, task: Task[Any], model: nn.Module, original: nn.Module) -> Staged | None:
    """Return the stages of qat, calibrated on the recipe's calibration examples.

    Each has the task's loss, with its terms of distillation where the task has some; the float model is the teacher.
    """
    if recipe.curriculum is None:
        return None
    teacher = copy.deepcopy(original).requires_grad_(False).eval()
    return Staged(recipe.curriculum.settings(), task.calibration(recipe), task.stage_loss(model, teacher))
