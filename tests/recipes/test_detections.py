from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fewbits.errors import CheckpointError, DataError, RecipeError
from fewbits.recipes.detections import drawn, load_detections
from fewbits.recipes.read import find, parse, read
from fewbits.recipes.schema import Recipe
from fewbits.recipes.tasks import load_task

RED, BLUE = (255, 0, 0), (0, 0, 255)


def recipe(**sections: object) -> Recipe:
    data = {"source": "scenes", "options": {"size": 64}, "train_examples": 12, "test_examples": 8, "validation": 0.25}
    plain = {"task": "detection", "data": data, "model": {"name": "detector_nano"}, "plan": {"weight_bits": 4}}
    return parse({**plain, **sections}, "test")


class Sees(nn.Module):
    """Sees one object of class 3 at the same place on every image."""

    def forward(self, images: Tensor) -> Tensor:
        row = torch.zeros(1, 1, 14)
        row[..., :4], row[..., 4 + 3] = torch.tensor([8.0, 8, 40, 30]), 0.9
        return row.repeat(len(images), 1, 1)


def test_the_task_holds_out_builds_trains_and_scores() -> None:
    task = load_task(recipe())
    assert task.validation is not None and (len(task.train), len(task.validation), len(task.test)) == (9, 3, 8)
    assert task.classes == tuple("0123456789")
    model, notes = task.build(recipe())
    again, _ = task.build(recipe())
    assert notes == () and all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    task.loss()(model, task.train.gather([0, 1], torch.Generator().manual_seed(0))).backward()
    found = task.evaluate(model, task.test, 4)
    assert 0 <= found[task.headline] <= 100 and set(found["per_class"]) == set(task.classes)
    assert model.training and model.backbone.training, "the mode is put back"


def test_ranges_are_set_in_batches_of_the_size_of_evaluation() -> None:
    given = recipe(evaluate={"batch_size": 4, "calibration_examples": 7})
    task = load_detections(given)
    assert [len(x) for x in task.calibration(given)] == [4, 3]
    assert [len(x) for x, _ in task.sensitivity(given)] == [4, 4, 1]


def test_weights_are_loaded_also_those_of_torchvision(tmp_path: Path) -> None:
    name = "torchvision:ssdlite320_mobilenet_v3_large"
    task = load_detections(recipe())
    for given in ("detector_nano", name):
        model, _ = task.build(recipe(model={"name": given}))
        inner = model if given == "detector_nano" else model.get_submodule("model")
        state = {key: value + 1 if value.is_floating_point() else value for key, value in inner.state_dict().items()}
        torch.save(state, tmp_path / "w.pth")
        loaded, _ = task.build(recipe(model={"name": given, "weights": str(tmp_path / "w.pth")}))
        first, second = (next(m.parameters()) for m in (model, loaded))
        torch.testing.assert_close(second, first + 1)
    with pytest.raises(CheckpointError, match="does not fit"):
        task.build(recipe(model={"name": "detector_nano", "weights": str(tmp_path / "w.pth")}))


def test_what_is_unfit_is_told() -> None:
    task = load_detections(recipe())
    with pytest.raises(RecipeError, match="label_smoothing"):
        task.loss(0.1)
    with pytest.raises(RecipeError, match="has no options"):
        task.build(recipe(model={"name": "detector_nano", "options": {"width": 3}}))
    with pytest.raises(DataError, match="needs the folder of its data.*data.path"):
        load_detections(recipe(data={"source": "voc"}))


def test_scenes_stand_in_for_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbits.tasks.detection_sources.shared_data_dir", lambda: None)
    task = load_detections(read(find("detection_bccd")).smoked())
    assert "in place of 'bccd'" in task.notes[0] and task.classes == tuple("0123456789")
    assert task.train.augmentation is not None and task.train.augmentation.flip == "both"


def test_pictures_show_the_right_boxes_and_those_of_each_form() -> None:
    task = load_detections(recipe())
    rows = task.pictures({"float": Sees(), "quantized": Sees()})
    assert len(rows) == 4
    assert [tile["caption"] for tile in rows[0]["tiles"]] == ["right", "float", "quantized"]
    assert rows[0]["tiles"][1]["image"] == rows[0]["tiles"][2]["image"]
    assert rows[0]["tiles"][0]["image"] != rows[0]["tiles"][1]["image"]
    right = {task.classes[int(label)] for label in task.test.objects[0].labels}
    assert {entry["name"] for entry in rows[0]["legend"]} == right | {"3"}


def test_boxes_are_drawn_where_they_are_in_the_colour_of_their_class() -> None:
    uri = drawn(torch.full((3, 80, 80), 128, dtype=torch.uint8), [(1, (10.0, 20.0, 50.0, 60.0))], [RED, BLUE])
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))).astype(int)
    assert pixels.shape == (320, 320, 3)
    blue = pixels[..., 2] - pixels[..., 0] > 60
    ys, xs = blue.nonzero()
    for found, side in zip((xs.min(), ys.min(), xs.max(), ys.max()), (40, 80, 200, 240)):
        assert abs(found - side) <= 3
    assert not blue[100:220, 60:180].any()


def test_any_callable_that_gives_outputs_is_measured(tmp_path: Path) -> None:
    """So that an ONNX file is."""
    task = load_detections(recipe())
    see: Callable[[Tensor], Tensor] = Sees()
    assert task.evaluate(lambda x: see(x), task.test, 4) == task.evaluate(Sees(), task.test, 3)
