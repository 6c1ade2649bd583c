from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewbits.errors import DataError
from fewbits.recipes import images as module
from fewbits.recipes.images import build, find_weights, load_images
from fewbits.recipes.read import find, parse, read
from fewbits.recipes.schema import Recipe


def recipe(**data: object) -> Recipe:
    sections = {"model": {"name": "reference_cnn"}, "plan": {"weight_bits": 2}}
    return parse({"data": {"source": "digits", **data}, **sections}, "test")


@pytest.fixture
def no_shared_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbits.tasks.sources.shared_data_dir", lambda: None)
    monkeypatch.setattr(module, "shared_data_dir", lambda: None)


def test_validation_is_held_out_of_the_training_images() -> None:
    found = load_images(recipe(validation=0.25))
    assert found.validation is not None
    whole = load_images(recipe(validation=0))
    assert whole.validation is None
    assert len(found.train) + len(found.validation) == len(whole.train) == 1438
    train, held = (x.gather(range(len(x)))[0].flatten(1) for x in (found.train, found.validation))
    assert not (train[:, None] == held[None, :50]).all(2).any()
    assert len(found.test) == len(whole.test) == 359


def test_fewer_examples_are_chosen_class_by_class() -> None:
    found = load_images(recipe(train_examples=100, test_examples=50, validation=0))
    assert len(found.train) == 100 and len(found.test) == 50
    assert torch.bincount(found.train.labels).min() >= 9


def test_an_empty_data_folder_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    for stand_in in (False, True):  # a folder that the user names is never replaced
        with pytest.raises(DataError, match="is empty.*data.path=FOLDER"):
            load_images(recipe(source="cifar10", path=str(tmp_path), stand_in=stand_in))


@pytest.mark.usefixtures("no_shared_data")
def test_missing_data_says_where_to_put_it() -> None:
    with pytest.raises(DataError, match=r"Put 'cifar10' .*--set data\.path=FOLDER; --smoke runs without data"):
        load_images(read(find("cifar10_resnet20")))


@pytest.mark.usefixtures("no_shared_data")
@pytest.mark.parametrize(("source", "shape"), [("cifar10", (3, 32, 32)), ("fashion_mnist", (1, 28, 28))])
def test_a_stand_in_has_the_shape_of_the_data_and_says_what_it_is(source: str, shape: tuple[int, ...]) -> None:
    found = load_images(recipe(source=source).smoked())
    assert found.train.shape == found.test.shape == shape
    assert found.sample(3).shape == (3, *shape)
    assert "random images in place" in found.notes[0]
    assert len(found.test.classes) == 10


@pytest.mark.usefixtures("no_shared_data")
def test_missing_weights_are_an_error_but_in_a_smoke_run() -> None:
    chosen = read(find("cifar10_resnet20")).smoked()
    images = load_images(chosen)
    assert "random weights in place" in build(chosen, images)[1][0]
    strict = chosen.model_copy(update={"data": chosen.data.model_copy(update={"stand_in": False})})
    with pytest.raises(DataError, match=r"are not there.*--set model\.weights=FILE"):
        build(strict, images)


def test_a_model_is_built_from_the_seed_and_the_file(tmp_path: Path) -> None:
    chosen = recipe()
    images = load_images(chosen)
    first, again = (build(chosen, images)[0] for _ in range(2))
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    path = tmp_path / "w.pt"
    torch.save({k: torch.zeros_like(v) for k, v in first.state_dict().items()}, path)
    given = chosen.model_copy(update={"model": chosen.model.model_copy(update={"weights": str(path)})})
    assert not build(given, images)[0].classifier.weight.any()
    assert find_weights(str(path)) == path and find_weights("nothing.pt") is None
