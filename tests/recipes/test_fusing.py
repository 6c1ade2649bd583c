"""Balanced fusion and attention alignment in a run."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fewbits.allocate import uniform_plan
from fewbits.errors import PlanError, RecipeError, TrainingError
from fewbits.layers import calibrate, quantize
from fewbits.losses import AttentionAlignment, Taps
from fewbits.recipes.folder import RunFolder
from fewbits.recipes.fusing import alignment_weight
from fewbits.recipes.read import parse
from fewbits.recipes.runner import finish, run
from fewbits.recipes.schema import Recipe
from fewbits.recipes.tasks import load_task


def recipe(**sections: Any) -> Recipe:
    plain: dict[str, Any] = {
        "task": "segmentation",
        "data": {"source": "scenes", "options": {"train": 24, "test": 8, "side": 48}, "validation": 0},
        "model": {"name": "unet_nano", "options": {"widths": [8, 12, 16]}},
        "plan": {"weight_bits": 4, "act_bits": 4},
        "fusion": {"finetune_steps": 2},
        "alignment": {"taps": ["up.0", "up.1"], "options": {"weight": 0.5}},
        "qat": {"max_steps": 4, "batch_size": 8, "lr": 0.01, "log_every": 1},
        "export": None,
        "evaluate": {"batch_size": 8, "calibration_examples": 16},
    }
    return parse({**plain, **sections}, "test")


def quiet(text: str) -> None:
    pass


def test_nodes_come_are_controlled_and_leave_nothing(tmp_path: Path) -> None:
    result = run(recipe(), tmp_path / "run", say=quiet)
    assert result["packed"]["code_mismatches"] == 0 and result["packed"]["bit_equal_before_folding"]
    nodes = {node["name"]: node for node in result["fusion"]["nodes"]}
    assert list(nodes) == ["up.0.fuse.cat0", "up.1.fuse.cat0"]
    assert all(node["folded"].startswith("requant into") for node in nodes.values())
    assert all(node["gains"][0] != node["gains"][1] for node in nodes.values()), "four steps moved them"
    assert list(result["fusion"]["forms"]) == ["true norm", "constant norm", "folded", "fine-tuned"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any("fusion/up.0.fuse.cat0/log_ratio" in line for line in lines)
    assert not [name for name in load_file(tmp_path / "run/model.safetensors") if "fusion" in name]
    assert "Balanced fusion" in (tmp_path / "run/report.html").read_text()


def test_a_run_stopped_behind_the_fold_ends_equal(tmp_path: Path) -> None:
    run(recipe(), tmp_path / "whole", say=quiet)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("finetune.json", "finetune.pt", "pack.json"):
        (tmp_path / "cut/steps" / name).unlink()
    shutil.rmtree(tmp_path / "cut/finetune")
    (tmp_path / "cut/model.safetensors").unlink()
    finish(RunFolder.open(tmp_path / "cut"), say=quiet)
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_ratio_of_gradients_finds_the_weight_of_alignment(tmp_path: Path) -> None:
    rules = {"taps": ["up.0"], "ratio": 0.3}
    run(recipe(alignment=rules), tmp_path / "run", say=quiet)
    weight = json.loads((tmp_path / "run/steps/weigh.json").read_text())["result"]["weight"]
    task = load_task(recipe())
    teacher, _ = task.build(recipe())
    student = copy.deepcopy(teacher)
    x, y = task.train.gather(range(8))
    calibrate(quantize(student, uniform_plan(student, 4, 4), verbose=False), [x])
    given = recipe(alignment=rules).alignment
    assert given is not None
    before = [value.clone() for value in (*student.parameters(), *student.buffers())]
    found = alignment_weight(task.loss(), student, teacher, given, (x, y))
    assert found > 0 and weight > 0
    assert all(torch.equal(a, b) for a, b in zip(before, (*student.parameters(), *student.buffers())))
    with Taps(student.train(), teacher, ["up.0"]) as taps:
        loss = task.loss()(student, (x, y))
        taps.teach(x)
        ratio = taps.gradient_ratio(taps.loss(AttentionAlignment(weight=found)), loss)
    assert ratio == pytest.approx(0.3, rel=1e-3)


def test_alignment_changes_what_is_trained(tmp_path: Path) -> None:
    found = []
    for name, alignment in (("with", {"taps": ["up.0"], "options": {"weight": 5.0}}), ("without", None)):
        run(recipe(fusion=None, alignment=alignment), tmp_path / name, say=quiet)
        found.append(torch.load(tmp_path / name / "steps/train.pt", weights_only=True)["down.0.0.0.weight"])
    assert not torch.equal(*found)


def test_what_cannot_be_folded_is_told_before_the_training(tmp_path: Path) -> None:
    dynamic = {"weight_bits": 4, "act_bits": 4, "act_quantizer": "dynamic"}
    with pytest.raises(RecipeError, match=r"fusion\.fold requant cannot fold .*up\.0\.fuse\.cat0.*'dynamic' cannot"):
        run(recipe(plan=dynamic, alignment=None), tmp_path / "run", say=quiet)
    assert not (tmp_path / "run/steps/train.json").exists()


@pytest.mark.parametrize("given", [{"options": {"measure": "inputs"}}, {"mode": "learned"}])
def test_an_add_whose_gains_will_part_is_told_before_the_training(tmp_path: Path, given: dict[str, Any]) -> None:
    gated = {"name": "unet_nano", "options": {"widths": [8, 12], "fusion": "gate"}}
    with pytest.raises(RecipeError, match=r"up\.0\.fuse\.add1.*gains will be unequal"):
        run(recipe(model=gated, fusion={"nodes": ["up.0.fuse.add1"], **given}, alignment=None), tmp_path, say=quiet)
    assert not (tmp_path / "steps/train.json").exists()


@pytest.mark.parametrize(
    ("sections", "error", "words"),
    [
        ({"fusion": {"nodes": ["up.0.fuse.cat1"]}}, PlanError, r"did you mean 'up\.0\.fuse\.cat0'"),
        ({"alignment": {"taps": ["up.9"]}}, TrainingError, r"no module 'up\.9' to tap"),
        (
            {"alignment": {"taps": ["down.1"]}},
            TrainingError,
            "no layer with an input quantizer takes in what .down.1. returns",
        ),
    ],
)
def test_unknown_names_stop_a_run_before_the_float_training(
    tmp_path: Path, sections: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        run(recipe(**sections, float_training={"max_steps": 2}), tmp_path / "run", say=quiet)
    assert not (tmp_path / "run/float").exists()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"qat": None, "alignment": None}, "fusion is for qat"),
        ({"qat": None, "fusion": None}, "alignment is for qat"),
        ({"from_scratch": True}, "fusion and from_scratch do not go together"),
        ({"fusion": {"mode": "off", "options": {"gains": [1, 2]}}}, "gains="),
        ({"fusion": {"options": {"etta": 1}}}, "etta"),
        ({"alignment": {"taps": []}}, "taps"),
        ({"alignment": {"taps": ["up.0"], "ratio": 0.2, "options": {"weight": 1.0}}}, "takes the place of"),
        ({"alignment": {"taps": ["up.0"], "options": {"divergence": "l2"}}}, "divergence must be one of"),
    ],
)
def test_contradictions_are_told(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(**sections)


def test_a_smoke_run_fine_tunes_for_a_few_steps() -> None:
    smoked = recipe(fusion={"finetune_steps": 50}).smoked()
    assert smoked.fusion is not None and smoked.fusion.finetune_steps == smoked.smoke.steps
