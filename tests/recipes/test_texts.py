from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.errors import DataError, FewbitsError, PlanError, RecipeError
from fewbits.recipes.read import find, names, parse, read
from fewbits.recipes.runner import run
from fewbits.recipes.schema import Recipe
from fewbits.recipes.tasks import load_task
from fewbits.recipes.texts import Texts, load_texts
from fewbits.report.page import write_report
from tests.recipes.runs import packed_content

LAYER = {"weight": {"bits": 2}, "input": {"bits": 8, "symmetric": False}}


def recipe(**sections: Any) -> Recipe:
    data = {
        "name": "letters",
        "task": "language",
        "data": {"source": "python_topics", "options": {"context": 16}},
        "model": {"name": "gpt_nano", "options": {"layers": 1, "heads": 2, "width": 16}},
        "plan": {"method": "blocks", "layer": LAYER},
        "evaluate": {"batch_size": 16, "calibration_examples": 16},
        "export": {"mode": "smallest"},
    }
    return parse(data | sections, "test")


@pytest.fixture
def no_shared_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbits.tasks.text.shared_data_dir", lambda: None)


def test_train_validation_and_test_follow_each_other_in_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(chr(40 + i % 80) for i in range(1000)))
    data = {"source": "text", "path": str(tmp_path), "validation": 0.25, "options": {"context": 8, "test": 0.2}}
    found = load_task(recipe(data=data))
    assert isinstance(found, Texts) and found.validation is not None
    assert [len(part.tokens) for part in (found.train, found.validation, found.test)] == [600, 200, 200]
    assert found.train.tokens[0] == 40 and found.validation.tokens[0] == 40 + 600 % 80
    whole = load_texts(recipe(data=data | {"validation": 0, "train_examples": 10, "test_examples": 9}))
    assert whole.validation is None and len(whole.train) == 10 and len(whole.test) == 9
    assert whole.sample(3).shape == (3, 8)


def test_the_model_takes_vocabulary_and_context_from_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcd " * 100)
    data = {"source": "text", "path": str(tmp_path / "a.txt"), "options": {"context": 8, "tokens": "char"}}
    task = load_task(recipe(data=data))
    (model, _), (again, _) = (task.build(recipe(data=data)) for _ in range(2))
    assert model.vocabulary == 5 and model.context == 8
    assert torch.equal(model.head.weight, again.head.weight)


def test_missing_weights_are_an_error_but_in_a_smoke_run() -> None:
    chosen = recipe(model={"name": "gpt_nano", "weights": "nowhere.pt"})
    with pytest.raises(DataError, match=r"'nowhere.pt' are not there.*--set model\.weights=FILE"):
        load_task(chosen).build(chosen)
    smoked = chosen.smoked()
    assert load_task(smoked).build(smoked)[1] == ("random weights in place of 'nowhere.pt', which is not there",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": 200}, "tokenizer has 256 tokens, the model's embedding only 200"),
        ({"context": 8}, "context is 16 tokens, but the model 'gpt_nano' has a context of 8"),
        ({"layer": 8}, "no option 'layer'; did you mean 'layers'"),
    ],
)
def test_a_model_that_does_not_fit_the_text_is_told(options: dict[str, int], message: str) -> None:
    chosen = recipe(model={"name": "gpt_nano", "options": options})
    with pytest.raises(FewbitsError, match=message):
        load_task(chosen).build(chosen)


def test_unusable_texts_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match=r"(does not exist|too short)"):
            load_texts(recipe(data={"source": "text", "path": str(path), "stand_in": True}))
    with pytest.raises(RecipeError, match="a text has no option 'contxt'; did you mean 'context'"):
        load_texts(recipe(data={"source": "python_topics", "options": {"contxt": 8}}))


@pytest.mark.usefixtures("no_shared_data")
def test_a_missing_text_is_an_error_but_in_a_smoke_run() -> None:
    chosen = read(find("language_a1w1"))
    with pytest.raises(DataError, match=r"--set data\.source=text --set data\.path=FILE"):
        load_texts(chosen)
    assert "in place of 'tiny_shakespeare'" in load_texts(chosen.smoked()).notes[0]


@pytest.mark.parametrize("name", [n for n in names() if n.startswith("language_")])
def test_a_recipe_trains_both_models_alike_and_says_what_its_name_does(name: str) -> None:
    chosen = read(find(name))
    assert chosen.qat == chosen.float_training and chosen.from_scratch
    layer, parts = chosen.plan.layer, name.split("_")
    assert layer is not None
    bits = parts[1].removeprefix("a").replace("w", " ").split() if parts[1].startswith("a") else [None, parts[1][1:]]
    assert layer["weight"]["bits"] == int(bits[1])
    assert ("input" in layer) == (bits[0] is not None) and (bits[0] is None or layer["input"]["bits"] == int(bits[0]))
    assert layer["weight"].get("sparsity") == (parts[2].replace("to", ":") if len(parts) > 2 else None)


def test_a_plan_of_blocks_needs_a_layer_and_a_model_with_blocks(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"plan\.layer is for plan\.method blocks"):
        recipe(plan={"method": "blocks"})
    with pytest.raises(RecipeError, match=r"plan\.layer is for plan\.method blocks"):
        recipe(plan={"weight_bits": 2, "layer": LAYER})
    with pytest.raises(RecipeError, match="bits must be one of"):
        recipe(plan={"method": "blocks", "layer": {"weight": {"bits": 9}}})
    with pytest.raises(RecipeError, match="from_scratch needs qat"):
        recipe(from_scratch=True)
    images = {"task": "classification", "data": {"source": "digits"}, "model": {"name": "reference_cnn"}}
    with pytest.raises(PlanError, match=r"inside an nn\.ModuleList"):
        run(recipe(**images).smoked(), tmp_path / "run", say=lambda text: None)


@pytest.mark.timeout(300)
def test_a_run_from_scratch_is_resumed_to_the_bit_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"max_steps": 6, "batch_size": 8, "lr": 0.01, "optimizer": "adamw"}
    chosen = recipe(float_training=training, qat=training, from_scratch=True, export=None).smoked()
    whole = run(chosen, tmp_path / "whole", say=lambda text: None)

    class Killed(BaseException):
        """What a kill looks like from inside."""

    from fewbits.recipes import texts
    from fewbits.recipes.folder import RunFolder
    from fewbits.recipes.runner import finish

    left = [4 + 3]  # the float training has four steps

    def loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return original(*args, **kwargs)

    original = texts.next_token_loss
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(texts, "next_token_loss", loss)
        run(chosen, tmp_path / "killed", say=lambda text: None)
    again = finish(RunFolder.open(tmp_path / "killed"), lambda text: None)
    for form in ("float", "calibrated", "quantized", "packed"):
        assert again[form]["metrics"] == whole[form]["metrics"]
    assert packed_content(tmp_path / "killed/model.safetensors") == packed_content(tmp_path / "whole/model.safetensors")
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    page = write_report(tmp_path / "whole").read_text()
    assert "perplexity" in page and "next-token accuracy" in page and "onfusion" not in page


def test_from_scratch_the_float_training_leaves_no_trace(tmp_path: Path) -> None:
    training = {"max_steps": 4, "batch_size": 8, "lr": 0.01, "optimizer": "adamw"}
    sections: dict[str, Any] = {"qat": training, "export": None}
    with_float = recipe(**sections, float_training=training, from_scratch=True)
    alone, after = (
        run(chosen.smoked(), tmp_path / name, say=lambda text: None)
        for name, chosen in {"alone": recipe(**sections), "after": with_float}.items()
    )
    assert alone["float"]["metrics"] != after["float"]["metrics"]
    for form in ("calibrated", "quantized"):
        assert alone[form]["metrics"] == after[form]["metrics"]


@pytest.mark.parametrize("share", ["0.1", None, True])
def test_the_share_of_the_test_text_is_a_number(share: Any) -> None:
    with pytest.raises(RecipeError, match="data.options.test is the last share"):
        load_texts(recipe(data={"source": "python_topics", "options": {"test": share}}))
