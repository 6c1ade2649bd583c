"""A small recipe, and one finished run that all tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fewbits.deploy import file
from fewbits.recipes.read import find, parse, read
from fewbits.recipes.runner import run
from fewbits.recipes.schema import Recipe


def small(**sections: Any) -> Recipe:
    """Return the smoke recipe of a narrow reference CNN on digits, with other sections where given."""
    data = {
        "name": "small",
        "data": {"source": "digits"},
        "model": {"name": "reference_cnn", "options": {"width": 4}},
        "plan": {"weight_bits": 2, "act_bits": 8},
        "qat": {"epochs": 1},
    }
    return parse(data | sections, "test").smoked()


def packed_content(path: Path) -> tuple[dict[str, bytes], Any]:
    """Return what a packed file holds; its header may list the same keys in another order."""
    blobs, manifest = file.read(path)
    return {name: blob.numpy().tobytes() for name, blob in blobs.items()}, manifest


def shared_run(factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a smoke run of the recipe 'digits', made once a session; copy it to change it."""
    folder = factory.getbasetemp() / "shared_run"
    if not (folder / "report.html").is_file():
        run(read(find("digits")).smoked(), folder, replace=True, say=lambda text: None)
    return folder
