"""The tasks that a recipe may name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fewbits.recipes.images import load_images
from fewbits.recipes.schema import Recipe
from fewbits.recipes.task import Task
from fewbits.recipes.texts import load_texts

TASKS: dict[str, Callable[[Recipe], Task[Any]]] = {"classification": load_images, "language": load_texts}


def load_task(recipe: Recipe) -> Task[Any]:
    """Load the data of a recipe. Raises DataError, saying where to put it, where it is not there."""
    return TASKS[recipe.task](recipe)
