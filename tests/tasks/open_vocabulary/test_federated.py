from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.errors import DataError
from fewbits.tasks.annotations import Skipped, load_examples
from fewbits.tasks.open_vocabulary.federated import Federated, as_text, read_lvis, read_objects365
from fewbits.tasks.open_vocabulary.truth import Truth, Verified

LVIS = {
    "categories": [
        {"id": 9, "name": "bow_(weapon)", "frequency": "r"},
        {"id": 2, "name": "alarm_clock", "frequency": "f"},
        {"id": 5, "name": "Christmas_tree", "frequency": "c"},
    ],
    "images": [
        {
            "id": 8,
            "coco_url": "http://images.cocodataset.org/val2017/000000000008.jpg",
            "neg_category_ids": [9],
            "not_exhaustive_category_ids": [2],
        },
        {"id": 3, "file_name": "b.png", "neg_category_ids": [], "not_exhaustive_category_ids": []},
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 9, "bbox": [5, 5, 10, 10], "area": 50.0},
        {"id": 2, "image_id": 8, "category_id": 2, "bbox": [0, 0, 40, 20], "area": 700.0},
    ],
}


def lvis(folder: Path, change: Callable[[Any], None] = lambda data: None) -> Federated:
    data = copy.deepcopy(LVIS)
    change(data)
    (folder / "lvis.json").write_text(json.dumps(data))
    return read_lvis(folder / "lvis.json", folder)


def test_categories_are_read_as_words() -> None:
    assert as_text("bow_(weapon)") == "bow weapon" and as_text("Cabinet/shelf") == "cabinet shelf"
    assert as_text("a_(b)/_C") == "a b c"


def test_lvis_tells_frequency_and_what_was_verified(tmp_path: Path) -> None:
    read = lvis(tmp_path)
    assert read.classes == ("alarm clock", "christmas tree", "bow weapon")  # by rising id
    assert read.groups == {"frequent": ("alarm clock",), "common": ("christmas tree",), "rare": ("bow weapon",)}
    assert read.verified["000000000008.jpg"] == Verified(frozenset({"bow weapon"}), frozenset({"alarm clock"}))
    assert read.verified["b.png"] == Verified()
    assert [box.name for record in read.records for box in record.boxes] == ["alarm clock", "bow weapon"]


def test_lvis_images_are_those_of_coco(tmp_path: Path, png: Callable[..., bytes]) -> None:
    (tmp_path / "val2017").mkdir()
    for name in ("val2017/000000000008.jpg", "b.png"):
        (tmp_path / name).write_bytes(png(80, (20, 40)))
    read = lvis(tmp_path)
    examples = load_examples(read.records, read.classes, (32, 32), Skipped())
    assert examples.names == ("000000000008.jpg", "b.png")
    assert [o.labels.tolist() for o in examples.objects] == [[0], [2]]
    (tmp_path / "val2017/000000000008.jpg").rename(tmp_path / "000000000008.jpg")  # without the folder of the split
    assert lvis(tmp_path).records[0].image == tmp_path / "000000000008.jpg"


def test_where_detections_count_follows_from_what_was_verified(tmp_path: Path) -> None:
    read = lvis(tmp_path)
    counts, partial = Truth.of_records(read.records, read.classes, read.verified).looked_for()
    assert counts.tolist() == [[True, False, True], [False, False, True]]
    assert partial.tolist() == [[True, False, False], [False, False, False]]
    everywhere, nowhere = Truth.of_records(read.records, read.classes).looked_for()
    assert everywhere.all() and not nowhere.any()


def test_truth_without_images_has_boxes_and_areas_of_the_file(tmp_path: Path) -> None:
    read = lvis(tmp_path)
    truth = Truth.of_records(read.records, read.classes, read.verified)
    assert truth.objects[0].boxes.tolist() == [[0, 0, 40, 20]] and truth.objects[0].areas.tolist() == [700]
    with pytest.raises(DataError, match="'alarm clock' on 000000000008.jpg is an unknown class"):
        Truth.of_records(read.records, ["bow weapon"])
    with pytest.raises(DataError, match=r"1 of 2 images, the first: 'b\.png'"):
        Truth.of_records(read.records, read.classes, {"000000000008.jpg": Verified()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["images"][0]["neg_category_ids"].append(2), "image 8 has objects of 'alarm clock'"),
        (lambda data: data["images"][1].pop("neg_category_ids"), "'neg_category_ids' is missing"),
        (lambda data: data["images"][1].update(not_exhaustive_category_ids=[77]), "77 is missing"),
        (lambda data: data["images"][1].update(file_name="000000000008.jpg"), "same file name"),
        (lambda data: data["images"].append(data["images"][0]), "two images have the same id"),
        (lambda data: data["categories"][1].update(id=data["categories"][0]["id"]), "two categories have the same id"),
        (lambda data: data["categories"][0].pop("frequency"), "'frequency' is missing"),
        (lambda data: data["categories"][0].update(frequency="x"), r"one of \['f', 'c', 'r'\]"),
        (lambda data: data["categories"][0].update(name="Alarm clock"), "same text 'alarm clock'"),
        (lambda data: data.pop("images"), "lvis.json.*'images' is missing"),
    ],
)
def test_what_is_malformed_is_told(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    with pytest.raises(DataError, match=message):
        lvis(tmp_path, change)


@pytest.mark.parametrize("place", ["images/v1/patch8/o_1.jpg", "patch8/o_1.jpg", "o_1.jpg"])
def test_objects365_is_read_wherever_its_patches_are(tmp_path: Path, png: Callable[..., bytes], place: str) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_bytes(png(80, (20, 40)))
    given = {"image_id": 4, "category_id": 2, "isfake": 0, "isreflected": 0, "iscrowd": 0, "area": 100.0}
    data = {
        "images": [{"id": 4, "file_name": "images/v1/patch8/o_1.jpg", "height": 20, "width": 40}],
        "categories": [{"id": 2, "name": "Wild Bird"}, {"id": 1, "name": "Cabinet/shelf"}],
        "annotations": [
            {"id": 1, **given, "bbox": [5, 5, 10, 10]},
            {"id": 2, **given, "bbox": [0, 0, 20, 5], "iscrowd": 1},
        ],
    }
    (tmp_path / "o.json").write_text(json.dumps(data))
    records, classes = read_objects365(tmp_path / "o.json", tmp_path)
    examples = load_examples(records, classes, (32, 32), Skipped())
    assert examples.classes == ("cabinet shelf", "wild bird") and examples.names == ("o_1.jpg",)
    assert examples.objects[0].boxes.tolist() == [[5, 5, 15, 15], [0, 0, 20, 5]]
    assert examples.objects[0].labels.tolist() == [1, 1] and examples.objects[0].crowd.tolist() == [False, True]


def test_objects365_without_names_is_malformed(tmp_path: Path) -> None:
    (tmp_path / "o.json").write_text(json.dumps({"images": [], "annotations": [], "categories": [{"id": 1}]}))
    with pytest.raises(DataError, match=r"o\.json.*'name' is missing"):
        read_objects365(tmp_path / "o.json", tmp_path)


@pytest.fixture
def real(shared: Path) -> Federated:
    file = shared / "lvis_val_100/lvis_val_100.json"
    if not file.is_file():
        pytest.skip("no annotations of LVIS beside the checkout")
    return read_lvis(file, shared / "coco_small/images")


def test_real_annotations_of_lvis(real: Federated) -> None:
    assert {name: len(classes) for name, classes in real.groups.items()} == {
        "frequent": 315,
        "common": 461,
        "rare": 454,
    }
    truth = Truth.of_records(real.records, real.classes, real.verified)
    assert len(truth.names) == 100 and sum(len(o.labels) for o in truth.objects) == 977
    counts, partial = truth.looked_for()
    assert 100 * 2 < counts.sum() < 100 * 40 and partial.sum() == 16 and not (partial & ~counts).any()


def test_real_images_of_coco_have_their_annotations_of_lvis(real: Federated) -> None:
    if not any(record.image.is_file() for record in real.records):
        pytest.skip("no image of LVIS beside the checkout")
    examples = load_examples(real.records, real.classes, (96, 96), Skipped(allowed=True))
    by_name = {record.image.name: record for record in real.records}
    for name, objects in zip(examples.names, examples.objects):
        boxes = torch.tensor([box.corners for box in by_name[name].boxes])
        assert torch.allclose(objects.boxes, boxes, atol=1.0)  # none lies outside: the image is the right one
    assert len(Truth.of(examples, real.verified).names) == len(examples)
