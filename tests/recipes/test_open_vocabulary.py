"""Open-vocabulary detection as a task: trained on base classes, measured on all, packed for any words."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.errors import DataError, PlanError, RecipeError
from fewbits.layers import quantize, quantized_layers
from fewbits.plan import Plan
from fewbits.recipes import revisit
from fewbits.recipes.folder import RunFolder
from fewbits.recipes.open_vocabulary import OpenDetections, load_open_detections, looking_for
from fewbits.recipes.planning import make_plan
from fewbits.recipes.read import find, read
from fewbits.recipes.revisit import Finished
from fewbits.recipes.runner import finish, run
from fewbits.recipes.tasks import load_task
from fewbits.tasks.open_vocabulary import distill, sizes
from fewbits.tasks.open_vocabulary.detector import OpenVocabularyDetector
from fewbits.tasks.open_vocabulary.packed import AskedDetector
from fewbits.tasks.open_vocabulary.policy import policy_4_4_8
from fewbits.train import Checkpoints
from tests.recipes.open_runs import STAGES, open_recipe
from tests.recipes.runs import packed_content
from tests.tasks.open_vocabulary.made import TINY, vocabulary

GROUPS = {"map_base", "map_novel", "map_frequent", "map_common", "map_rare"}


@pytest.fixture(scope="module", autouse=True)
def tiny_size() -> Iterator[None]:
    """A size that is trained in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sizes.SIZES, "tiny", TINY)
        yield


def quiet(text: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("open") / "whole"
    run(open_recipe(), folder, say=quiet)
    return folder


def loaded() -> tuple[OpenDetections, OpenVocabularyDetector]:
    task = load_open_detections(open_recipe())
    model, notes = task.build(open_recipe())
    assert isinstance(model, OpenVocabularyDetector) and notes == ()
    return task, model


def test_a_run_tells_of_all_groups_of_classes_and_of_relations(whole: Path) -> None:
    result: dict[str, Any] = json.loads((whole / "result.json").read_text())
    for form in ("float", "calibrated", "quantized", "packed"):
        metrics = result[form]["metrics"]
        assert set(metrics) >= GROUPS | {"map", "map50", "per_class"} and 0 <= metrics["map"] <= 100
        assert set(metrics["per_class"]) == set(result["classes"])
    assert result["packed"]["bit_equal_before_folding"] and result["packed"]["code_mismatches"] == 0
    assert dict(Plan.load(whole / "plan.json").decided_from) == {"method": "policy", "bits": "4-4-8", "seed": 0}
    *boxes, last = result["pictures"]
    assert [t["caption"] for t in boxes[0]["tiles"]] == ["right", "float", "calibrated", "quantized"]
    assert [t["caption"].split(":")[0] for t in last["tiles"][1:]] == ["calibrated", "quantized"]
    assert last["tiles"][0]["image"] != last["tiles"][1]["image"] != last["tiles"][2]["image"]
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["curriculum/stage"] for line in lines if "curriculum/stage" in line] == [1, 1, 2, 2]


def test_the_packed_file_of_a_run_answers_words_that_it_never_saw_as_the_trained_model(whole: Path) -> None:
    trained, asked = Finished.open(whole).trained(), AskedDetector.open(whole / "model.safetensors")
    words = vocabulary("a purple ring", "a cup")
    images = torch.randn(2, 3, 64, 64)
    for model in (trained, asked.model):
        assert isinstance(model, OpenVocabularyDetector)
        model.set_vocabulary(words)
    with torch.no_grad():
        apart = (asked.model(images) - trained(images)).abs()
    assert apart.median() < 0.02 and apart.max() < 2  # norms are folded: a code at a border may fall to either side
    assert asked.card.side == (64, 64) and asked.card.size == "tiny"


def test_the_verbs_on_a_run_keep_what_its_file_tells(whole: Path, tmp_path: Path) -> None:
    revisit.repack(whole, tmp_path / "again.safetensors")
    assert packed_content(tmp_path / "again.safetensors") == packed_content(whole / "model.safetensors")
    forms = revisit._torch_forms(Finished.open(whole))
    images = torch.randn(1, 3, 64, 64)
    words = len(Finished.open(whole).task.classes)
    assert {form(images).shape[-1] for form in forms.values()} == {4 + words}


class Killed(BaseException):
    """What a kill looks like from inside: nothing may catch it."""


def killed_after(calls: int) -> Any:
    """Return the detector's loss, which works so many times."""
    left, loss = [calls], distill.detection_loss

    def detection_loss(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return loss(*args)

    return detection_loss


def test_a_run_that_is_killed_in_float_in_a_stage_and_at_the_border_ends_equal(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, steps = tmp_path / "killed", []
    for calls in (1, 1 + 1, 1, 1):  # float: after 1 of 2 steps; qat: after 1, 2 (the border) and 3 of 4
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(distill, "detection_loss", killed_after(calls))
            if folder.exists():
                finish(RunFolder.open(folder), quiet)
            else:
                run(open_recipe(), folder, say=quiet)
        steps += [int(p.name.split("_")[1]) for p in Checkpoints(folder / "checkpoints", 2).paths()[:1]]
    assert steps == [1, 2, 3]
    resumed, before = finish(RunFolder.open(folder), quiet), json.loads((whole / "result.json").read_text())
    for name in ("plan.json", "metrics.jsonl", "recipe.yaml"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert packed_content(folder / "model.safetensors") == packed_content(whole / "model.safetensors")
    assert (
        json.loads(json.dumps(resumed["quantized"])) == before["quantized"]
        and resumed["pictures"] == before["pictures"]
    )


def test_a_model_looks_for_the_classes_of_what_it_is_measured_on() -> None:
    task, model = loaded()
    assert model.vocabulary.prompts == task.train.classes and len(task.test.classes) > len(task.train.classes)
    (outputs, _), *_ = task.answers(model, task.test, 4)
    assert outputs.shape[-1] == 4 + len(task.test.classes) and model.vocabulary.prompts == task.train.classes
    (outputs, _), *_ = task.answers(model, task.train, 4)
    assert outputs.shape[-1] == 4 + len(task.train.classes)
    assert set(task.evaluate(model, task.train, 4)) >= {"map", "map_base"}
    assert "map_novel" not in task.evaluate(model, task.train, 4), "no example is novel there"


def test_what_is_deployed_has_the_words_of_the_test_and_no_others() -> None:
    task, model = loaded()
    images = task.sample(2)
    with looking_for(model.eval(), task.all), torch.no_grad():
        want = model(images)
    fixed = task.deployed(copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(fixed(images), want)
    with looking_for(fixed, task.base):
        assert fixed(images).shape == want.shape, "it is left as it is"
    with pytest.raises(DataError, match="was reparameterized"):
        fixed.set_vocabulary(task.base)  # type: ignore[operator]


def test_stages_are_trained_beside_the_float_model() -> None:
    task, model = loaded()
    teacher, batch = copy.deepcopy(model).requires_grad_(False).eval(), task.train.gather(range(4))
    torch.nn.init.normal_(next(model.backbone.parameters()))
    of, stages = task.stage_loss(model, teacher), open_recipe().curriculum
    assert of is not None and stages is not None
    plain, terms = task.loss()(model, batch), [of(s, task.loss()) for s in stages.settings().stages]
    first, second = (loss(model, batch) for loss in terms)
    assert plain < first < second
    heavy = open_recipe(open_vocabulary={"width": 32, "features": 12.0})
    of = load_open_detections(heavy).stage_loss(model, teacher)
    assert of is not None
    torch.testing.assert_close(of(stages.settings().stages[0], task.loss())(model, batch) - plain, 2 * (first - plain))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"plan": {"method": "policy"}}, "plan.policy is for plan.method policy: give both"),
        ({"plan": {"policy": "4-4-8", "weight_bits": 4}}, "plan.policy is for plan.method policy"),
        ({"plan": {"method": "policy", "policy": "4-4"}}, "a policy is W-A-Att.*got '4-4'"),
        ({"plan": {"method": "policy", "policy": "4-4-8", "weight_bits": 4}}, "weight_bits is for method uniform"),
        ({"plan": {"method": "policy", "policy": "4-4-8"}, "budget": {"size_mb": 1}}, "policy takes no budget"),
        ({"task": "detection"}, "the section open_vocabulary is for that task, this is detection"),
        ({"open_vocabulary": {"relation": 3.0}}, "open_vocabulary.relation.*did you mean 'relations'"),
        ({"open_vocabulary": {"beta": 0}}, "open_vocabulary.beta"),
    ],
)
def test_recipes_that_cannot_be_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        open_recipe(**sections)


def refused(**sections: Any) -> None:
    recipe = open_recipe(**sections)
    load_open_detections(recipe).build(recipe)


def test_what_does_not_fit_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="models of open_vocabulary are yolo-world:SIZE.*got 'detector_nano'"):
        refused(model={"name": "detector_nano"})
    with pytest.raises(RecipeError, match=r"sizes .*'nan'.*'nano'"):
        refused(model={"name": "yolo-world:nan"})
    with pytest.raises(RecipeError, match="has no options"):
        refused(model={"name": "yolo-world:tiny", "options": {"width": 3}})
    with pytest.raises(DataError, match="cannot read a CLIP text model"):
        refused(open_vocabulary={"text": str(tmp_path / "clip")})
    with pytest.raises(DataError, match="needs the folder of its data.*data.path"):
        refused(data={"source": "lvis"})
    with pytest.raises(RecipeError, match="label_smoothing"):
        loaded()[0].loss(0.1)
    stages = [{**stage, "distill": ["feats"]} for stage in STAGES]
    with pytest.raises(RecipeError, match="no distillation term 'feats'.*'feat'"):
        run(open_recipe(curriculum={"stages": stages}), tmp_path / "a", say=quiet)
    with pytest.raises(PlanError, match="'policy' has no option 'granularity'; known: act_granularity"):
        options = {"method": "policy", "policy": "4-4-8", "options": {"granularity": "channel"}}
        run(open_recipe(plan=options), tmp_path / "b", say=quiet)


def test_the_option_of_a_policy_is_that_of_the_function() -> None:
    options = {"method": "policy", "policy": "3-3-8", "options": {"act_granularity": "channel"}}
    recipe = open_recipe(plan=options, qat=None, curriculum=None, float_training=None)
    task, model = loaded()
    found = dict(make_plan(model, recipe, task.sample(1), []))
    quantize(model, policy_4_4_8(model, 3, 3, 8, "channel"), verbose=False)
    wanted = {name: layer.layer_plan for name, layer in quantized_layers(model).items()}
    assert {name: layer for name, layer in found.items() if layer is not None} == wanted
    assert next(name for name, layer in found.items() if layer is None) == "backbone.stem.0"


def test_embeddings_are_kept_in_the_cache_of_the_recipe(tmp_path: Path) -> None:
    task = load_open_detections(open_recipe(open_vocabulary={"width": 32, "cache": str(tmp_path / "texts")}))
    assert len(task.all) == len(task.test.classes) and list((tmp_path / "texts").iterdir())
    assert task.about(open_recipe())["identity"] == task.all.identity


def test_composed_scenes_stand_in_for_what_is_not_there() -> None:
    recipe = read(find("open_vocabulary_scenes"), ["data.source=lvis", "data.options.flip=horizontal"]).smoked()
    task = load_task(recipe)
    assert "in place of 'lvis'" in task.notes[0] and "a red solid circle" in task.classes
    assert task.train.augmentation.flip == "horizontal" and task.train.shape == (3, 128, 128)
