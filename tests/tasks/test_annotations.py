from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.errors import DataError, RecipeError
from fewbits.tasks.annotations import read_coco
from fewbits.tasks.detection_sources import load_detection

CAT = {"bbox": [5, 5, 10, 10], "category_id": 7}
BAD = {
    "no area": {**CAT, "bbox": [5, 5, 0, 10]},
    "outside of the image of 40 x 20 pixels": {**CAT, "bbox": [35, 5, 10, 10]},
    r"40\.2.*outside of the image": {**CAT, "bbox": [40.2, 5, 0.5, 10]},
    r"-0\.9.*outside of the image": {**CAT, "bbox": [5, -0.9, 10, 0.5]},
    "category 8.*unknown class": {**CAT, "category_id": 8},
}

Write = Callable[..., Path]


@pytest.fixture
def coco(tmp_path: Path, png: Callable[..., bytes]) -> Write:
    """Write two images of 40 x 20 pixels and their annotations, for train and test."""

    def write(*annotations: dict[str, Any], missing: bool = False, broken: bool = False) -> Path:
        (tmp_path / "images").mkdir()
        (tmp_path / "images/a.png").write_bytes(png(50, (20, 40)))
        if not missing:
            (tmp_path / "images/b.png").write_bytes(b"no image" if broken else png(200, (20, 40)))
        given = [{"id": i, "image_id": 1, **a} for i, a in enumerate(annotations)]
        images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]
        categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "ant"}]
        data = {"images": images, "annotations": given, "categories": categories}
        (tmp_path / "a.json").write_text(json.dumps(data))
        return tmp_path

    return write


def load(folder: Path, **options: Any) -> Any:
    pair = ["a.json", "images"]
    return load_detection("coco", folder, {"size": [40, 40], "train": pair, "test": pair, **options})


def test_coco_boxes_are_scaled_with_their_images(coco: Write) -> None:
    crowd = {"bbox": [20, 0, 20, 20], "category_id": 3, "iscrowd": 1, "area": 77.0}
    train, test, notes = load(coco(CAT, {"bbox": [0, 0, 40.5, 20.5], "category_id": 3}, crowd))
    assert test.classes == ("ant", "cat") and test.names == ("a.png", "b.png") and notes == ()
    images, targets = test.gather([0, 1])
    assert images.shape == (2, 3, 40, 40) and images.dtype == torch.float32
    # the width is that of the file, the height is doubled; a pixel beyond the border is cut; crowds are no targets
    assert targets[0].tolist() == [[1, 5, 10, 15, 30], [0, 0, 0, 40, 40]]
    assert targets[1].tolist() == [[-1] * 5] * 2
    assert train.objects[0].areas.tolist() == [100, 800, 77] and train.objects[0].crowd.tolist() == [0, 0, 1]
    back = targets[0, :, 1:] * test.scales[0]
    assert torch.equal(back, train.objects[0].boxes[:2])


@pytest.mark.parametrize("message", BAD)
def test_bad_boxes_are_errors_or_left_out_and_noted(coco: Write, message: str) -> None:
    folder = coco(CAT, BAD[message])
    with pytest.raises(DataError, match=f"a.json.*{message}.*skip_bad"):
        load(folder)
    _, test, notes = load(folder, skip_bad=True)
    assert len(test.objects[0].labels) == 1 and "left out: 2" in notes[0]


@pytest.mark.parametrize("kind", ["missing", "broken"])
def test_bad_images_are_errors_or_left_out_and_noted(coco: Write, kind: str) -> None:
    folder = coco(CAT, **{kind: True})
    with pytest.raises(DataError, match="b.png"):
        load(folder)
    _, test, notes = load(folder, skip_bad=True)
    assert test.names == ("a.png",) and "b.png" in notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": "cat"}, r"classes is a list of names, such as \[cat, dog\], got 'cat'"),
        ({"classes": [7]}, "classes is a list of names"),
        ({"classes": ["cat", "cat"]}, "each once"),
        ({"classes": []}, "one name or more"),
        ({"skip_bad": "no"}, "skip_bad is true or false, got 'no'"),
    ],
)
def test_options_of_another_type_are_told(coco: Write, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(coco(CAT), **options)


def test_pairs_of_coco_are_names_and_there_is_a_class(coco: Write) -> None:
    folder = coco(CAT)
    with pytest.raises(RecipeError, match=r"pairs \[annotations, images\], got \(1, 2\)"):
        load(folder, train=[1, 2])
    data = json.loads((folder / "a.json").read_text())
    (folder / "a.json").write_text(json.dumps({**data, "categories": [], "annotations": []}))
    with pytest.raises(DataError, match="one name or more"):
        load(folder)


def test_malformed_json_is_told(tmp_path: Path) -> None:
    for text, message in (("{", "COCO's JSON"), ("{}", "'categories' is missing")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DataError, match=message):
            read_coco(tmp_path / "a.json", tmp_path)
    lost = {"categories": [], "images": [], "annotations": [{"id": 4, "image_id": 9}]}
    (tmp_path / "a.json").write_text(json.dumps(lost))
    with pytest.raises(DataError, match="annotation 4 is of image 9"):
        read_coco(tmp_path / "a.json", tmp_path)


OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


@pytest.fixture
def voc(tmp_path: Path, png: Callable[..., bytes]) -> Callable[..., Path]:
    def write(*objects: tuple[Any, ...]) -> Path:
        for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (tmp_path / name).mkdir(parents=True)
        (tmp_path / "JPEGImages/a.png").write_bytes(png(9, (32, 32)))
        body = "".join(OBJECT.format(*o) for o in objects)
        (tmp_path / "Annotations/a.xml").write_text(f"<annotation>{body}</annotation>")
        for split in ("train", "val"):
            (tmp_path / f"ImageSets/Main/{split}.txt").write_text("a  1\n")
        return tmp_path

    return write


def test_voc_corners_count_from_one(voc: Callable[..., Path]) -> None:
    _, test, _ = load_detection("voc", voc(("dog", 1, 1, 32, 16), ("cat", 3, 4, 5, 6)), {"size": [64, 32]})
    assert test.classes == ("cat", "dog")
    assert test.objects[0].boxes.tolist() == [[0, 0, 32, 16], [2, 3, 5, 6]]
    assert test.gather([0])[1][0].tolist() == [[1, 0, 0, 32, 32], [0, 2, 6, 5, 12]]


def test_voc_tells_what_is_wrong(voc: Callable[..., Path]) -> None:
    folder = voc(("dog", 7, 4, 7, 6))
    with pytest.raises(DataError, match=r"a\.xml.*'dog'.*has no area"):
        load_detection("voc", folder, {})
    with pytest.raises(DataError, match="unknown class; did you mean 'dogs'"):
        load_detection("voc", folder, {"classes": ["dogs"]})
    (folder / "Annotations/a.xml").write_text("<annotation><object/></annotation>")
    with pytest.raises(DataError, match=r"a\.xml.*lacks its name"):
        load_detection("voc", folder, {})
    with pytest.raises(DataError, match="nope.txt"):
        load_detection("voc", folder, {"train": "nope"})


def test_unknown_names_and_options_are_told() -> None:
    with pytest.raises(RecipeError, match="did you mean 'scenes'"):
        load_detection("scene", None, {})
    with pytest.raises(RecipeError, match="did you mean 'mosaic'"):
        load_detection("scenes", None, {"mosaics": 1})
    with pytest.raises(DataError, match="mosaic and colour are between 0 and 1, got 'a'"):
        load_detection("scenes", None, {"mosaic": "a"})
    with pytest.raises(DataError, match=r"scale is the least and most magnification.*got \('a', 'b'\)"):
        load_detection("scenes", None, {"scale": ["a", "b"]})
    with pytest.raises(DataError, match="multiple of 32"):
        load_detection("scenes", None, {"size": 100})


def test_blood_cells(shared: Path) -> None:
    train, test, notes = load_detection("bccd", None, {"size": [32, 64]}, {"train": 8, "test": None})
    assert len(train) == 8 and len(test) == 87 and test.classes == ("RBC", "WBC", "Platelets")
    assert sum(len(o.labels) for o in test.objects) > 900 and "left out: 1" in notes[0]
