"""The curriculum of a recipe, for its qat."""

from __future__ import annotations

from typing import Any

from fewbits.recipes.schema import Recipe
from fewbits.recipes.task import Task
from fewbits.train import Batches, Staged
from fewbits.train.start import steps_per_epoch


def check_stages(recipe: Recipe, task: Task[Any]) -> None:
    """Raise TrainingError, before anything is trained, where a stage would have no step."""
    if recipe.curriculum is not None and recipe.qat is not None:
        config = recipe.qat.fit_config(recipe.seed)
        batches = Batches(task.train, recipe.qat.batch_size)
        recipe.curriculum.settings().ends(config.total_steps(steps_per_epoch(batches, config)))


def stages_of(recipe: Recipe, task: Task[Any]) -> Staged | None:
    """Return the stages of qat: the task's loss in each, calibrated on the recipe's calibration examples."""
    if recipe.curriculum is None:
        return None
    return Staged(recipe.curriculum.settings(), task.calibration(recipe))
