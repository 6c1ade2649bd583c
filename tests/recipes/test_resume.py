from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.errors import ExportError
from fewbits.recipes import images, runner
from fewbits.recipes.folder import RunFolder
from fewbits.recipes.runner import finish, run
from fewbits.tasks.classification import cross_entropy
from tests.recipes.runs import packed_content, small

EQUAL = ("plan.json", "metrics.jsonl", "model.onnx", "recipe.yaml")


class Killed(BaseException):
    """What a kill looks like from inside: nothing may catch it."""


def quiet(text: str) -> None:
    """Say nothing."""


def killed_after(calls: int) -> Any:
    """Return a loss that works so many times."""
    left = [calls]

    def loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return cross_entropy(*args, **kwargs)

    return loss


def test_a_run_that_is_killed_in_both_trainings_and_between_steps_ends_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(float_training={"epochs": 1}, qat={"epochs": 1})
    whole = run(recipe, tmp_path / "whole", say=quiet)

    def killed_after_packing(text: str) -> None:
        if text.startswith("pack"):
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(images, "cross_entropy", killed_after(3))
        run(recipe, tmp_path / "killed", say=quiet)
    folder = RunFolder.open(tmp_path / "killed")
    assert not folder.done("float") and list((folder / "float/checkpoints").glob("*.pt"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(images, "cross_entropy", killed_after(5))
        finish(folder, quiet)
    assert folder.done("calibrate") and not folder.done("train")
    with pytest.raises(Killed):
        finish(folder, killed_after_packing)
    resumed = finish(folder, quiet)

    for name in EQUAL:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    first, second = (packed_content(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert first == second
    for part in ("float", "calibrated", "quantized", "packed", "histograms", "plan"):
        assert resumed[part] == whole[part], part
    assert resumed["onnx"]["metrics"] == whole["onnx"]["metrics"]


def test_resuming_a_finished_run_does_no_step_again(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((finished_run / "result.json").read_text())
    monkeypatch.setattr(images, "cross_entropy", killed_after(0))
    said: list[str] = []
    after = finish(RunFolder.open(finished_run), said.append)
    assert len(said) == 7 and all("done before" in text for text in said)
    assert after == before


def test_a_model_that_packs_wrongly_is_told_after_the_report(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    recipe = RunFolder.open(finished_run).recipe()
    runner.require_faithful(result, recipe)
    wrong = {**result, "packed": {**result["packed"], "code_mismatches": 3}}
    with pytest.raises(ExportError, match="3 codes differ"):
        runner.require_faithful(wrong, recipe)
    strict = recipe.model_copy(update={"export": recipe.export.model_copy(update={"min_agreement": 99.0})})
    wrong = {**result, "onnx": {**result["onnx"], "top1_agreement": 90.0}}
    with pytest.raises(ExportError, match=r"90\.00 % of the test examples.*asks for 99 %"):
        runner.require_faithful(wrong, strict)
