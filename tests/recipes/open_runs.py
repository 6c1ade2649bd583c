"""Recipes of an open-vocabulary detector that run in seconds."""

from __future__ import annotations

from typing import Any

from fewbits.recipes.read import parse
from fewbits.recipes.schema import Recipe

STAGES = [
    {"quantize": ["backbone"], "share": 0.5, "distill": ["feat"]},
    {"quantize": ["neck", "heads"], "share": 0.5, "distill": ["feat", "tpsd"]},
]


def open_recipe(**sections: Any) -> Recipe:
    """Return the recipe of a detector of size "tiny", which the test adds to ``SIZES``; with other sections."""
    few = {"optimizer": "adamw", "lr": 1e-3, "batch_size": 4, "checkpoint_every": 1, "log_every": 1}
    words = {
        "shapes": ["circle", "square", "cross"],
        "colours": ["red", "green", "blue"],
        "digits": ["one", "two", "six"],
    }
    plain: dict[str, Any] = {
        "name": "open",
        "task": "open_vocabulary",
        "data": {"source": "composed", "options": {"size": 64, "textures": ["solid", "dotted"], **words},
                 "train_examples": 16, "test_examples": 8, "validation": 0.0},
        "model": {"name": "yolo-world:tiny"},
        "open_vocabulary": {"width": 32},
        "float_training": {**few, "max_steps": 2},
        "plan": {"method": "policy", "policy": "4-4-8"},
        "qat": {**few, "max_steps": 4, "quantizer_lr": 0.1},
        "curriculum": {"stages": STAGES},
        "export": None,
        "evaluate": {"batch_size": 4, "calibration_examples": 8},
    }  # fmt: skip
    return parse(plain | sections, "test")
