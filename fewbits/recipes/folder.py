"""The run folder: what a run leaves, and which of its steps are done.

A finished step leaves ``steps/NAME.json`` (its results and seconds), written last and whole, and with it
``steps/NAME.pt`` where it changed the model. So a run that was killed goes on with the step it was in.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits.errors import CheckpointError, RecipeError
from fewbits.recipes.read import read, write
from fewbits.recipes.schema import Recipe
from fewbits.train.checkpoint import prepare_folder

RESULTS = (
    "recipe.yaml", "plan.json", "plan_before.json", "metrics.jsonl", "checkpoints", "model.safetensors", "model.onnx",
    "result.json", "report.html",
)  # fmt: skip
INNER = ("steps", "float", "finetune", "search", "tensorboard")  # and what a run needs for itself


class RunFolder:
    """A folder with one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def create(path: Path, recipe: Recipe, replace: bool = False) -> RunFolder:
        """Start a run in ``path``; replace: remove the run that is there, and nothing else.

        Raises CheckpointError where the folder cannot be written or holds a run already.
        """
        folder = RunFolder(path)
        prepare_folder(path)
        if folder.holds_run:
            if not replace:
                raise CheckpointError(
                    f"{path} holds a run already: go on with 'fewbits resume {path}', replace it with --force, or "
                    "choose another folder with --out"
                )
            folder._clear()
        (path / "checkpoints").mkdir(exist_ok=True)
        write(recipe, path / "recipe.yaml")
        return folder

    @staticmethod
    def open(path: Path) -> RunFolder:
        """Open the run in ``path``, or that a file in it belongs to. Raises RecipeError where there is none."""
        folder = RunFolder(path.parent if path.is_file() else path)
        if not folder.holds_run:
            raise RecipeError(
                f"{str(path)!r} is no run folder: it has no recipe.yaml; give the --out folder of a 'fewbits run'"
            )
        return folder

    @property
    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return (self.path / "recipe.yaml").is_file()

    def recipe(self) -> Recipe:
        """Return the recipe of the run."""
        return read(self.path / "recipe.yaml")

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def once(self, name: str, work: Callable[[], dict[str, Any]], model: nn.Module | None = None) -> dict[str, Any]:
        """Do a step and return its results; or, where it is done already, put ``model`` into the state it left."""
        record, state = self / f"steps/{name}.json", self / f"steps/{name}.pt"
        if record.is_file():
            if model is not None:
                model.load_state_dict(_load(state))
            return dict(_json(record)["result"])
        start = time.perf_counter()
        result = work()
        record.parent.mkdir(exist_ok=True)
        if model is not None:
            self.keep(name, model)
        put_json(record, {"seconds": time.perf_counter() - start, "result": result})
        return result

    def keep(self, name: str, model: nn.Module) -> None:
        """Write the state dict of a model where ``state`` reads it."""
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        (self / "steps").mkdir(exist_ok=True)
        put(self / f"steps/{name}.pt", buffer.getvalue())

    def done(self, name: str) -> bool:
        """Whether a step is finished."""
        return (self / f"steps/{name}.json").is_file()

    def state(self, name: str) -> dict[str, Any]:
        """Return the state dict that a step left. Raises CheckpointError where it is missing or damaged."""
        return _load(self / f"steps/{name}.pt")

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of every finished step, in the order in which they ended, and their total.

        What a killed process had done of its last step is not counted.
        """
        records = sorted((self / "steps").glob("*.json"), key=lambda p: p.stat().st_mtime_ns)
        by_step = {p.stem: float(_json(p)["seconds"]) for p in records}
        return {"total": sum(by_step.values()), **by_step}

    def _clear(self) -> None:
        for name in (*RESULTS, *INNER):
            path = self / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def put(path: Path, payload: bytes) -> None:
    """Write a file whole or not at all. Raises CheckpointError where it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(payload)
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; free some space, then 'fewbits resume'") from error


def put_json(path: Path, data: Any) -> None:
    """Write plain data as JSON, whole or not at all; numbers that JSON cannot hold become null."""
    put(path, (json.dumps(finite(data), indent=1, allow_nan=False) + "\n").encode())


def finite(data: Any) -> Any:
    """Return plain data with None for NaN and the infinities."""
    if isinstance(data, Mapping):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; delete it to have its step done again") from error


def _load(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except Exception as error:  # torch raises a dozen classes here
        raise CheckpointError(
            f"{path} cannot be read: {str(error).splitlines()[0]:.120}; delete "
            f"{path.with_suffix('.json').name} beside it to redo its step"
        ) from error
