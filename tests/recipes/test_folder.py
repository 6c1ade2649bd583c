from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fewbits.errors import CheckpointError, RecipeError
from fewbits.recipes.folder import RunFolder, finite
from tests.recipes.runs import small


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write in .*choose another"):
        RunFolder.create(tmp_path / "file" / "run", small())


def test_a_run_is_replaced_only_on_demand_and_nothing_else_with_it(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, small())
    folder.once("float", lambda: {"a": 1})
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds a run already.*fewbits resume"):
        RunFolder.create(tmp_path, small())
    assert RunFolder.create(tmp_path, small(), replace=True).done("float") is False
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(RecipeError, match=r"is no run folder: it has no recipe\.yaml"):
            RunFolder.open(path)


def test_a_step_is_done_once_and_gives_back_the_state_it_left(tmp_path: Path) -> None:
    folder, model, calls = RunFolder.create(tmp_path, small()), nn.Linear(2, 2), []

    def work() -> dict[str, float]:
        calls.append(1)
        nn.init.constant_(model.weight, 3.0)
        return {"top1": 1 / 3}

    first = folder.once("train", work, model)
    nn.init.zeros_(model.weight)
    again = RunFolder.open(tmp_path).once("train", work, model)
    assert calls == [1] and again == first
    assert torch.equal(model.weight, torch.full((2, 2), 3.0))
    assert folder.seconds["total"] == folder.seconds["train"] >= 0


def test_a_step_that_fails_is_not_done(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, small())
    with pytest.raises(ZeroDivisionError):
        folder.once("plan", lambda: {"a": 1 / 0})
    assert not folder.done("plan") and "plan" not in folder.seconds


def test_a_damaged_step_says_how_to_redo_it(tmp_path: Path) -> None:
    folder, model = RunFolder.create(tmp_path, small()), nn.Linear(2, 2)
    folder.once("train", lambda: {}, model)
    (tmp_path / "steps/train.pt").write_bytes(b"PK\x03\x04 not whole")
    with pytest.raises(CheckpointError, match=r"train\.pt cannot be read.*delete train\.json"):
        folder.once("train", lambda: {}, model)
    (tmp_path / "steps/train.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"train\.json is damaged"):
        folder.once("train", lambda: {})


def test_the_recipe_of_a_run_reads_back(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path, small(seed=5)).recipe() == small(seed=5)


def test_json_holds_no_infinity() -> None:
    data = finite({"a": [1.5, float("inf"), {"b": float("nan")}], "c": (1, "x", None)})
    assert json.loads(json.dumps(data, allow_nan=False)) == {"a": [1.5, None, {"b": None}], "c": [1, "x", None]}
