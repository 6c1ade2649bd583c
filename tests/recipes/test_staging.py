"""A curriculum in a recipe: refused early where it cannot be, and the same run when it is stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits.errors import RecipeError, TrainingError
from fewbits.recipes import images, runner
from fewbits.recipes.folder import RunFolder
from fewbits.recipes.runner import finish, run
from fewbits.recipes.schema import Recipe
from fewbits.tasks.classification import cross_entropy
from fewbits.train import Checkpoints
from tests.recipes.runs import packed_content, small

STAGES = [
    {"quantize": ["features.0", "features.1", "features.3", "features.4"], "share": 0.5},
    {"quantize": ["features", "classifier"], "share": 0.5},
]


def recipe(**sections: Any) -> Recipe:
    plain: dict[str, Any] = {
        "float_training": {"epochs": 1},
        "qat": {"epochs": 1, "quantizer_lr": 0.1, "ema": 0.8},
        "curriculum": {"stages": STAGES},
        "export": None,
    }
    return small(**(plain | sections))


def with_stages(*stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"curriculum": {"stages": list(stages), **more}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (with_stages(STAGES[0]), r"curriculum: shares of stages add up to 1, got \[0.5\]: 0.5"),
        (with_stages(STAGES[0], STAGES[0]), "is named more than once"),
        (
            with_stages({"quantise": ["a"], "share": 1.0}),
            "unknown key 'curriculum.stages.0.quantise'; did you mean 'qu",
        ),
        (with_stages({"quantize": [], "share": 1.0}), "curriculum.stages.0.quantize: .*at least 1 item"),
        (with_stages({"quantize": ["a"], "share": 1.0}, norms="fold"), "curriculum.norms: .*'train' or 'frozen'"),
        ({"qat": None}, "curriculum is for qat: add that section, or leave curriculum out"),
        ({"from_scratch": True}, "curriculum and from_scratch do not go together"),
        ({"alignment": {"taps": ["features"]}}, "curriculum and alignment do not go together"),
        ({"task": "detection", "open_vocabulary": {}}, "the section open_vocabulary is for that task"),
        ({"float_training": {"epochs": 1, "quantizer_lr": 0.1}}, "a float model has no quantizers"),
    ],
)
def test_what_cannot_be_staged_is_refused_with_its_place(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (with_stages({"quantize": ["feature", "classifier"], "share": 1.0}), "'feature', .* did you mean 'features'"),
        (with_stages({"quantize": ["features"], "share": 1.0}), "1 layers are in no stage, the first is 'classifier'"),
        (
            with_stages({"quantize": ["features"], "share": 1.0}, frozen=["classifier"]),
            "'classifier' is frozen in float, but quantized by the plan",
        ),
        (with_stages(*({**s, "share": share} for s, share in zip(STAGES, (0.999, 0.001)))), "stage 2 of 2 has none"),
    ],
)
def test_what_does_not_fit_the_model_is_found_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(runner, "fit", None)
    with pytest.raises(TrainingError, match=message):
        run(recipe(**sections), tmp_path / "run", say=quiet)


def test_a_task_without_terms_of_distillation_has_none_in_its_stages(tmp_path: Path) -> None:
    stages = [{**STAGES[0], "distill": ["feat"]}, STAGES[1]]
    with pytest.raises(RecipeError, match="no distillation term 'feat'; the task classification has none"):
        run(recipe(**with_stages(*stages)), tmp_path / "run", say=quiet)


class Killed(BaseException):
    """What a kill looks like from inside: nothing may catch it."""


def quiet(text: str) -> None:
    """Say nothing."""


def killed_after(calls: int) -> Any:
    """Return a loss that works so many times."""
    left = [calls]

    def loss(*args: Any, **kwargs: Any) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return cross_entropy(*args, **kwargs)

    return loss


def test_a_run_that_is_killed_in_its_stages_and_at_their_border_ends_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe()
    assert given.qat is not None
    given = given.model_copy(update={"qat": given.qat.model_copy(update={"checkpoint_every": 1})})
    whole = run(given, tmp_path / "whole", say=quiet)
    folder, steps = tmp_path / "killed", []
    for calls in (4 + 1, 1, 1):  # 4 steps of the float model; then qat after 1, 2 (the border) and 3 of its 4 steps
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(images, "cross_entropy", killed_after(calls))
            if folder.exists():
                finish(RunFolder.open(folder), quiet)
            else:
                run(given, folder, say=quiet)
        steps.append(int(Checkpoints(folder / "checkpoints", 2).paths()[0].name.split("_")[1]))
    assert steps == [1, 2, 3]
    resumed = finish(RunFolder.open(folder), quiet)

    for name in ("plan.json", "metrics.jsonl", "recipe.yaml"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert packed_content(folder / "model.safetensors") == packed_content(tmp_path / "whole/model.safetensors")
    for part in ("float", "calibrated", "quantized", "packed"):
        assert resumed[part] == whole[part], part
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["curriculum/stage"] for line in lines if "curriculum/stage" in line] == [1, 1, 2, 2]


def test_the_first_stage_of_a_run_leaves_the_rest_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(images, "cross_entropy", killed_after(4 + 2))
        run(recipe(), tmp_path / "run", say=quiet)
    before = RunFolder.open(tmp_path / "run").state("float")
    after = Checkpoints.read(Checkpoints(tmp_path / "run/checkpoints", 2).paths()[0])["model"]
    changed = {n for n, t in before.items() if not torch.equal(t, after[n])}
    parts = [f"features.{i}." for i in (0, 1, 3, 4)]
    assert "features.0.weight" in changed and all(any(n.startswith(p) for p in parts) for n in changed)
