"""The tasks that a recipe may name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fewbits.recipes.detections import load_detections
from fewbits.recipes.images import load_images
from fewbits.recipes.open_vocabulary import load_open_detections
from fewbits.recipes.schema import Recipe
from fewbits.recipes.segmentations import load_segmentations
from fewbits.recipes.task import Task
from fewbits.recipes.texts import load_texts

HELD_OUT = 0.1
TASKS: dict[str, Callable[[Recipe], Task[Any]]] = {
    "classification": load_images,
    "language": load_texts,
    "segmentation": load_segmentations,
    "detection": load_detections,
    "open_vocabulary": load_open_detections,
}


def load_task(recipe: Recipe) -> Task[Any]:
    """Load the data of a recipe. Raises DataError, saying where to put it, where it is not there.

    A search measures on examples that are held out: where the recipe holds out none, HELD_OUT of them are.
    """
    if recipe.search is None or recipe.data.validation:
        return TASKS[recipe.task](recipe)
    data = recipe.data.model_copy(update={"validation": HELD_OUT})
    task = TASKS[recipe.task](recipe.model_copy(update={"data": data}))
    note = f"{HELD_OUT:.0%} of the training examples are held out for the search to measure on"
    return replace(task, notes=(*task.notes, note))
