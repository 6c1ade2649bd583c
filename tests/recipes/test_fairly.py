"""Groups in a run: planned by, trained for, told of and guarded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fewbits.errors import FairnessError, RecipeError
from fewbits.plan import Plan
from fewbits.recipes.fairly import WithGroups, group_batches, require_fair, verdict
from fewbits.recipes.folder import RunFolder
from fewbits.recipes.images import load_images
from fewbits.recipes.read import parse
from fewbits.recipes.runner import finish, run
from fewbits.recipes.schema import Recipe
from fewbits.train import Batches


def recipe(**sections: Any) -> Recipe:
    plain: dict[str, Any] = {
        "data": {"source": "digits_groups", "options": {"share": 0.2}, "train_examples": 400, "test_examples": 200},
        "model": {"name": "reference_cnn", "options": {"width": 4}},
        "plan": {"method": "fair", "menu": [2, 3, 4, 8], "quantizer": "maxabs", "act_quantizer": "lsq", "act_bits": 8},
        "budget": {"average_bits": 4.0},
        "fairness": {"mode": "dro", "least": 2},
        "qat": {"max_steps": 6, "batch_size": 32, "log_every": 1, "lr": 0.01},
        "export": None,
        "evaluate": {"group_examples": 32, "calibration_examples": 32},
    }
    return parse({**plain, **sections}, "test")


def quiet(text: str) -> None:
    pass


LEARNED = {
    "plan": {"weight_bits": 4, "quantizer": "learnable_bits", "act_quantizer": "lsq", "act_bits": 8},
    "budget": None,
    "learned_bits": {"average_bits": 4.5, "lr": 0.2},
}


def test_a_run_plans_by_groups_and_tells_of_each(tmp_path: Path) -> None:
    result = run(recipe(), tmp_path / "run", say=quiet)
    groups = result["groups"]
    assert set(groups["float"]["acc_groups"]) == {"majority", "minority"} == set(groups["changes"])
    assert groups["quantized"]["acc"] == pytest.approx(result["quantized"]["metrics"]["top1"])
    assert groups["worst_change"]["group"] in groups["verdict"] or "no group" in groups["verdict"]
    assert "equalized_odds_difference" in groups["fairlearn"]["quantized"]
    plan = Plan.load(tmp_path / "run/plan.json")
    mixed = [layer.weight.channel_bits for _, layer in plan if layer is not None and layer.weight is not None]
    assert any(mixed) and plan.decided_from["reducer"] == "balanced" and result["packed"]["code_mismatches"] == 0
    assert result["quantized"]["avg_weight_bits"] <= 4.0


def test_learned_widths_settle_and_a_stopped_run_ends_equal(tmp_path: Path) -> None:
    run(recipe(**LEARNED), tmp_path / "whole", say=quiet)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut/steps/pack.json").unlink()
    (tmp_path / "cut/model.safetensors").unlink()
    result = finish(RunFolder.open(tmp_path / "cut"), say=quiet)
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole) and result["packed"]["code_mismatches"] == 0
    plans = [layer.weight for _, layer in Plan.load(tmp_path / "cut/plan.json") if layer is not None]
    assert {plan.quantizer for plan in plans if plan is not None} == {"maxabs"}
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert any("bits/average" in line for line in lines)


def test_batches_hold_each_group_at_its_share() -> None:
    examples = WithGroups(load_images(recipe()).train)
    batches = Batches(examples, 40, seed=1)
    share = float((examples.batch_strata == 1).float().mean())
    for epoch in range(2):
        for index in range(len(batches)):
            images, labels, groups = batches.batch(epoch, index)
            assert len(images) == len(labels) == 40 and abs(int((groups == 1).sum()) - 40 * share) <= 1
    assert not torch.equal(batches.batch(0, 0)[1], batches.batch(1, 0)[1])


def test_importance_is_measured_on_each_group_alone() -> None:
    given = recipe(evaluate={"group_examples": 40})
    task = load_images(given)
    found = group_batches(task, given)
    assert {name: sum(len(y) for _, y in parts) for name, parts in found.items()} == {"majority": 40, "minority": 40}
    with pytest.warns(UserWarning, match=r"group 'minority' has \d+ training examples, of 100 wanted"):
        group_batches(task, recipe(evaluate={"group_examples": 100}))


def test_the_guard_fails_a_run_that_takes_too_much_from_a_group(tmp_path: Path) -> None:
    lost = {"groups": {"worst_change": {"group": "minority", "change": -6.1}}}
    with pytest.raises(FairnessError, match=r"group 'minority' lost 6\.10 points .*more than the 2 allowed"):
        require_fair(lost, 2.0)
    require_fair(lost, 7.0)
    require_fair(lost, None)


def test_the_verdict_is_a_sentence() -> None:
    sure = {"a": {"change": -6.1, "low": -7.3, "high": -4.9}, "b": {"change": 0.5, "low": 0.0, "high": 1.0}}
    assert verdict(sure) == "group 'a' loses most, 6.1 points (4.9 to 7.3)"
    assert verdict({"a": {"change": -1.0, "low": -3.0, "high": 1.0}}).endswith("which may be chance")
    assert verdict({"b": sure["b"]}) == "no group lost accuracy against float"


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"qat": None}, "fairness is for qat"),
        ({"learned_bits": {"average_bits": 4}}, "need each other"),
        ({**LEARNED, "learned_bits": None}, "need each other"),
        ({"fairness": {"mode": "gaps"}}, "mode"),
        ({"alignment": {"taps": ["x"]}}, "not together with alignment"),
    ],
)
def test_contradictions_are_told(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(**sections)


UNIFORM = {"plan": {"weight_bits": 4}, "budget": None}


@pytest.mark.parametrize(
    "sections",
    [{}, UNIFORM, {**UNIFORM, "fairness": None, "evaluate": {"guard_worst_group": 2.0}}],
    ids=["plan", "fairness", "guard"],
)
def test_data_without_groups_are_told_before_anything_is_trained(tmp_path: Path, sections: dict[str, Any]) -> None:
    given = recipe(**{"data": {"source": "digits"}, "float_training": {"max_steps": 2}, **sections})
    with pytest.raises(RecipeError, match="these data have no groups"):
        run(given, tmp_path / "run", say=quiet)
    assert not (tmp_path / "run/float").exists()
