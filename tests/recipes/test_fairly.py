"""Groups in a run: planned by, trained for, told of and guarded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fewbits.cost import Hardware, hardware_cost, model_shape, plan_cycles
from fewbits.errors import BudgetError, DataError, FairnessError, RecipeError
from fewbits.plan import Plan
from fewbits.recipes.fairly import WithGroups, group_batches, require_fair, verdict
from fewbits.recipes.folder import RunFolder
from fewbits.recipes.images import load_images
from fewbits.recipes.read import parse
from fewbits.recipes.runner import finish, run
from fewbits.recipes.schema import Recipe
from fewbits.tasks.image_groups import image_groups
from fewbits.tasks.models import build_model
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
    rows = {row["name"]: row["channel_bits"] for row in result["plan"]["layers"]}
    widths = {name: layer.weight.channel_bits for name, layer in plan if layer is not None and layer.weight is not None}
    assert all(rows[name] == {str(b): w.count(b) for b in set(w)} for name, w in widths.items() if w)
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


def test_widths_are_learned_to_an_energy(tmp_path: Path) -> None:
    given = {**LEARNED, "learned_bits": {"energy_uj": 0.008, "hardware": "shift_add", "lr": 0.2}}
    result = run(recipe(**given), tmp_path / "run", say=quiet)
    rows = {row["name"]: row["weight_bits"] for row in result["plan"]["layers"]}
    assert len(set(rows.values())) > 1 and result["packed"]["code_mismatches"] == 0
    plan = Plan.load(tmp_path / "run/plan.json")
    float_model = build_model("reference_cnn", 10, 1, width=4)
    float_model.load_state_dict(torch.load(tmp_path / "run/steps/float.pt", weights_only=True))
    shape = model_shape(float_model, torch.zeros(1, 1, 8, 8))
    found = hardware_cost(plan, shape, Hardware.load("shift_add"), plan_cycles(float_model, plan))
    assert found.compute_energy + found.memory_energy == pytest.approx(0.008, rel=0.1), "the widest is 0.0103"
    with pytest.raises(BudgetError, match=r"energy_uj=0.001 is out of reach: the model takes .* with 2 bits"):
        low = {**given, "learned_bits": {"energy_uj": 0.001, "hardware": "shift_add"}}
        run(recipe(**low), tmp_path / "low", say=quiet)


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
        ({**LEARNED, "learned_bits": {"energy_uj": 1.0}}, "need each other"),
        ({**LEARNED, "learned_bits": {}}, "average_bits or energy_uj"),
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


@pytest.mark.parametrize(
    ("task", "model", "metric"),
    [("segmentation", {"name": "unet_nano", "options": {"widths": [4, 8]}}, "miou"),
     ("detection", {"name": "detector_nano"}, "map")],
)  # fmt: skip
def test_boxes_and_masks_are_told_of_by_a_table_of_images(
    task: str, model: dict[str, Any], metric: str, tmp_path: Path
) -> None:
    lines = ["image,group", *(f"scene {i},{'night' if i % 3 else 'day'}" for i in range(9)), "scene 9,unknown"]
    (tmp_path / "groups.csv").write_text("\n".join(lines))
    side = {"side": 64, "size": [64, 64]} if task == "segmentation" else {"size": 64}
    given = parse(
        {"task": task, "data": {"source": "scenes", "options": side, "train_examples": 20, "test_examples": 12,
                                "validation": 0},
         "model": model, "plan": {"weight_bits": 2, "act_bits": 4, "first_last": None}, "export": None,
         "qat": {"max_steps": 2, "batch_size": 4}, "float_training": {"max_steps": 2, "batch_size": 4},
         "evaluate": {"batch_size": 4, "calibration_examples": 4, "groups": str(tmp_path / "groups.csv"),
                      "guard_worst_group": 100}},
        "test",
    )  # fmt: skip
    result = run(given, tmp_path / "run", say=quiet)
    groups = result["groups"]
    assert groups["metric"] == metric and set(groups["changes"]) == {"day", "night"}
    assert groups["quantized"]["counts"] == {"day": [3], "night": [6]}
    served = groups["quantized"]["acc_groups"]
    assert groups["quantized"]["acc_worst"] == min(served.values()) != max(served.values()) or metric == "map"
    page = (tmp_path / "run/report.html").read_text()
    assert "of each group</h3>" in page and "Accuracy of each group" not in page


def test_a_table_of_images_is_checked_before_anything_is_trained(tmp_path: Path) -> None:
    table = tmp_path / "groups.csv"
    given = {"evaluate": {"groups": str(table)}, "data": {"source": "digits"}, "plan": {"weight_bits": 4}}
    table.write_text("image,group\na,b\n")
    with pytest.raises(RecipeError, match="in classification, groups come with the data"):
        run(recipe(**given, budget=None, fairness=None), tmp_path / "run", say=quiet)
    with pytest.raises(DataError, match=r"no group of any of the 2 images, such as 'x.png'.* 'a'"):
        image_groups(table, ["x.png", "y.png"])
    table.write_text("image,group\na,b\na,c\n")
    with pytest.raises(DataError, match="gives 'a' two groups, 'b' and 'c'"):
        image_groups(table, ["a"])
    table.write_text("name,group\na,b\n")
    with pytest.raises(DataError, match="no column 'image'"):
        image_groups(table, ["a"])
