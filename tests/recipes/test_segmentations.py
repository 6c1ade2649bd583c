from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fewbits.errors import DataError, RecipeError
from fewbits.recipes.read import find, parse, read
from fewbits.recipes.schema import Recipe
from fewbits.recipes.segmentations import load_segmentations
from fewbits.report.pictures import class_colours


def recipe(**sections: object) -> Recipe:
    data = {"source": "scenes", "options": {"train": 12, "test": 6, "side": 48}, "validation": 0.25}
    plain = {"task": "segmentation", "data": data, "model": {"name": "unet_nano"}, "plan": {"weight_bits": 4}}
    return parse({**plain, **sections}, "test")


@pytest.fixture
def no_shared_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbits.tasks.sources.shared_data_dir", lambda: None)


class Answers(nn.Module):
    """Answers class ``kind`` everywhere."""

    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.full((len(x), 48, 48), self.kind), 11).movedim(-1, 1).float()


def test_the_task_holds_out_builds_trains_and_scores() -> None:
    task = load_segmentations(recipe(segmentation={"dice": 0.5, "class_weights": "balanced"}))
    assert task.validation is not None and (len(task.train), len(task.validation), len(task.test)) == (9, 3, 6)
    model, notes = task.build(recipe())
    assert notes == () and model(task.sample(2)).shape == (2, 11, 48, 48)
    again, _ = task.build(recipe())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    loss = task.loss(0.1)
    assert loss.ground == 0 and loss.class_weights.median() == 1 and loss.label_smoothing == 0.1
    loss(model, task.train.gather([0, 1], torch.Generator().manual_seed(0))).backward()
    found = task.evaluate(Answers(0), task.test, 4)
    assert found["dice"] == 0 and 50 < found["pixel_accuracy"] < 100 and task.headline in found


def test_ranges_are_set_in_batches_of_the_size_of_evaluation() -> None:
    given = recipe(evaluate={"batch_size": 4, "calibration_examples": 7})
    assert [len(x) for x in load_segmentations(given).calibration(given)] == [4, 3]
    assert [len(x) for x, _ in load_segmentations(given).sensitivity(given)] == [4, 4, 1]


def test_every_pixel_is_an_answer() -> None:
    task, want = load_segmentations(recipe()), torch.randn(2, 11, 48, 48)
    got = want.clone()
    got[0, :, 0, :5] = 9 - want[0, :, 0, :5]
    same = task.agreement(got, want)
    assert same.shape == (2 * 48 * 48,) and int((~same).sum()) == 5


def test_pictures_show_every_form_and_where_they_differ() -> None:
    task = load_segmentations(recipe())
    rows = task.pictures({"float": Answers(0), "quantized": Answers(3)})
    assert len(rows) == 4
    assert [t["caption"] for t in rows[0]["tiles"]] == ["image", "right", "float", "quantized", "where they differ"]

    def shown(place: int) -> np.ndarray:
        uri = rows[0]["tiles"][place]["image"]
        return np.array(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))

    palette = np.array(class_colours(11))
    assert np.array_equal(shown(1), palette[task.test.gather([0])[1][0].numpy()])
    assert (shown(2) == palette[0]).all() and (shown(3) == palette[3]).all() and (shown(4) == 255).all()
    names = {entry["name"] for entry in rows[0]["legend"]}
    assert {"ground", "digit 2"} <= names and len(names) < 11


@pytest.mark.usefixtures("no_shared_data")
def test_the_measurement_on_camvid_is_a_recipe() -> None:
    camvid = read(Path(__file__).parents[2] / "benchmarks" / "segmentation_camvid.yaml").smoked()
    task = load_segmentations(camvid)
    assert len(task.classes) == 11 and task.train.crop is None and task.train.size == (64, 64)


@pytest.mark.usefixtures("no_shared_data")
def test_scenes_stand_in_only_where_that_is_wanted() -> None:
    nuclei = read(find("segmentation_nuclei"))
    with pytest.raises(DataError, match=r"no path was given.*--set data\.path=FOLDER; --smoke runs without"):
        load_segmentations(nuclei)
    task = load_segmentations(nuclei.smoked())
    assert "scenes of digits in place of 'nuclei'" in task.notes[0] and task.classes == ("ground", "nucleus")
    images, masks = task.test.gather([0, 1])
    assert images.shape == (2, 3, 64, 64) and masks.unique().tolist() == [0, 1]


def test_what_does_not_belong_in_a_recipe_is_refused() -> None:
    with pytest.raises(RecipeError, match="section segmentation is for that task, this is classification"):
        recipe(task="classification", segmentation={"dice": 1})
    with pytest.raises(RecipeError, match="both 0"):
        recipe(segmentation={"cross_entropy": 0})
    with pytest.raises(DataError, match="give 11 numbers"):
        load_segmentations(recipe(segmentation={"class_weights": [1, 2]})).loss()
    with pytest.raises(RecipeError, match="own segmenters"):
        load_segmentations(recipe()).build(recipe(model={"name": "unet_big"}))
