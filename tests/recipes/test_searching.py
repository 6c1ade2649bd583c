"""A recipe that searches: what it measures on, what it leaves, and that a killed one ends the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.errors import BudgetError, RecipeError
from fewbits.plan import Plan
from fewbits.recipes import images, runner, searching
from fewbits.recipes.folder import RunFolder
from fewbits.recipes.runner import finish, run
from fewbits.recipes.schema import Recipe
from fewbits.recipes.tasks import load_task
from fewbits.report.load import read_result
from tests.recipes.runs import packed_content, small
from tests.recipes.test_resume import Killed, killed_after, quiet

PLAN = {"method": "sigma", "menu": [2, 4, 6, 8], "act_bits": 8, "first_last": None}


def searching_recipe(**sections: Any) -> Recipe:
    return small(**{
        "plan": PLAN, "budget": {"average_bits": 4, "accuracy_drop": 30}, "search": {"rounds": 1}, "export": None,
        **sections,
    })  # fmt: skip


def test_a_run_with_a_search_that_is_killed_ends_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = searching_recipe(budget={"average_bits": 3, "accuracy": 99}, qat=None)
    whole = run(recipe, tmp_path / "whole", say=quiet)
    steps = len(whole["search"]["log"])
    assert steps >= 4, "reference, clusters and two moves"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(images, "cross_entropy", killed_after(2))  # in the reference
        run(recipe, tmp_path / "killed", say=quiet)
    folder = RunFolder.open(tmp_path / "killed")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(images, "cross_entropy", killed_after(10))  # in the first move
        finish(folder, quiet)
    assert not folder.done("search") and len(json.loads((folder / "search/search.json").read_text())["steps"]) == 2
    resumed = finish(folder, quiet)
    for name in ("plan.json", "recipe.yaml"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    first, second = (packed_content(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert first == second
    for part in ("float", "calibrated", "quantized", "packed"):
        assert resumed[part] == whole[part], part
    log = [{k: v for k, v in entry.items() if k != "seconds"} for entry in resumed["search"]["log"]]
    assert log == [{k: v for k, v in entry.items() if k != "seconds"} for entry in whole["search"]["log"]]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a search under limits on hardware, too, and with quantized results."""
    folder = tmp_path_factory.mktemp("searched") / "run"
    plan = {**PLAN, "outputs": ["features.1"], "rules": [["classifier", {"weight": {"bits": 5}}]]}
    budget = {"average_bits": 4, "energy_uj": 1.0, "hardware": "shift_add", "accuracy_drop": 50}
    run(searching_recipe(plan=plan, budget=budget), folder, say=quiet)
    return folder


def test_the_result_holds_the_search_and_the_hardware(searched: Path) -> None:
    result = json.loads((searched / "result.json").read_text())
    found = result["search"]
    assert found["status"] in ("ok", "abandon", "exhausted", "max_steps") and found["steps"] == len(found["log"])
    assert set(found["targets"]) == {"average_bits", "energy_uj", "accuracy"} and found["seconds"] > 0
    assert result["seconds"]["search"] >= found["seconds"] * 0.9
    assert result["hardware"]["energy_uj"] > 0 and len(result["hardware"]["layers"]) == 5
    assert bool(found["missed"]) == any("out of reach" in note for note in result["notes"])
    shown = read_result(searched / "result.json").search
    assert shown is not None and len(shown.layers) == 4 and all(layer.sigma and layer.kl for layer in shown.layers)
    assert shown.log[0].phase == "reference" and shown.reference.costs["average_bits"] > 7
    assert "Accuracy" in (searched / "report.html").read_text()


def test_rules_and_results_of_the_recipe_are_in_every_plan_that_is_trained(searched: Path) -> None:
    plan = dict(Plan.load(searched / "plan.json").resolve(
        ["features.0", "features.3", "features.6", "features.9", "classifier"], ["features.1"],
    ))  # fmt: skip
    assert plan["classifier"].weight.bits == 5 and plan["features.1"].output.bits == 8
    decided = Plan.load(searched / "plan.json").decided_from
    assert decided["method"] == "sigma" and decided["seed"] == 0
    log = json.loads((searched / "result.json").read_text())["search"]["log"]
    assert all("classifier" not in entry["bits"] for entry in log), "its width is not searched"
    state = RunFolder.open(searched).state("searched")
    assert "features.1.output_quantizer.scale" in state


def test_it_measures_on_held_out_training_examples_and_never_on_the_test_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = searching_recipe(data={"source": "digits", "validation": 0})
    task = load_task(recipe)
    assert task.validation is not None and any("held out for the search" in note for note in task.notes)
    assert len(task.train) + len(task.validation) == recipe.data.train_examples
    measured = []

    def watch(self: Any, model: Any, examples: Any, size: int) -> dict[str, Any]:
        measured.append(examples)
        return original(self, model, examples, size)

    original = type(task).evaluate
    monkeypatch.setattr(type(task), "evaluate", watch)
    torch.manual_seed(0)
    found = searching.search(task.build(recipe)[0], recipe, task, tmp_path, quiet)
    assert measured and all(examples is task.validation for examples in measured)
    assert found.plan.decided_from["seed"] == 0


def test_a_language_model_is_searched_by_its_tokens(tmp_path: Path) -> None:
    data = {"source": "python_topics", "options": {"context": 16}}
    model = {"name": "gpt_nano", "options": {"width": 16, "layers": 1, "heads": 2}}
    recipe = searching_recipe(task="language", data=data, model=model, evaluate={"batch_size": 8})
    task = load_task(recipe)
    found = searching.search(task.build(recipe)[0], recipe, task, tmp_path, quiet)
    assert 0 <= found.accuracy <= 100 and found.costs["average_bits"] > 0


def test_a_search_by_fisher_information_gets_its_data(tmp_path: Path) -> None:
    recipe = searching_recipe(plan={**PLAN, "method": "sigma_fisher"}, float_training={"epochs": 1})
    task = load_task(recipe)
    model = task.build(recipe)[0]
    runner.check_plan(model, recipe, task.sample(1), task.sensitivity(recipe), task.loss())
    found = searching.search(model, recipe, task, tmp_path, quiet)
    assert found.plan.decided_from["method"] == "sigma_fisher" and found.costs["average_bits"] <= 4


def test_a_limit_below_what_is_possible_is_told_before_the_float_training() -> None:
    recipe = searching_recipe(budget={"average_bits": 1.5, "accuracy_drop": 1}, float_training={"epochs": 1})
    task = load_task(recipe)
    with pytest.raises(BudgetError, match=r"average_bits=1\.5 cannot be met: the least possible is 2"):
        runner.check_plan(task.build(recipe)[0], recipe, task.sample(1), [], task.loss())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"plan": {"method": "solver"}}, "search is for plan.method sigma.*, got solver"),
        ({"search": None}, r"accuracy_drop.* can only be held by a search: add a section 'search'"),
        ({"budget": None}, "plan.method sigma needs a budget"),
        ({"budget": {"energy_uj": 3}}, "budget: energy_uj needs hardware="),
        ({"plan": {**PLAN, "options": {"steps": 3}}}, r"\['steps'\] belong into the section 'search'"),
        ({"search": {"lr": -1}}, "search: lr must be above 0"),
        ({"search": {"epoch_refine": 1}}, "unknown key 'search.epoch_refine'; did you mean 'epochs_refine'"),
        ({"from_scratch": True}, "from_scratch would throw away"),
    ],
)
def test_bad_recipes(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        searching_recipe(**sections)
