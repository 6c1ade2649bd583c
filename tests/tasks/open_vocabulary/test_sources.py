from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.errors import DataError, RecipeError
from fewbits.tasks.open_vocabulary.sources import load_open

NAMES = ("cat", "dog", "bus", "cup")
LISTS = {"train": ["train.json", "images"], "test": ["val.json", "images"], "size": [32, 64]}


@pytest.fixture
def folder(tmp_path: Path, png: Callable[..., bytes]) -> Path:
    """Two training and two test images, each with an object of each of two of the four classes."""
    (tmp_path / "images").mkdir()
    for split, start in (("train", 0), ("val", 2)):
        images, annotations = [], []
        for number in (start, start + 1):
            name = f"{number}.png"
            (tmp_path / "images" / name).write_bytes(png(90, (32, 64)))
            more = {"neg_category_ids": [], "not_exhaustive_category_ids": [1 + number % 2]}
            images.append({"id": number, "file_name": name, "height": 32, "width": 64, **more})
            for label in (number % 2, 2 + number % 2):
                annotations.append(
                    {"id": len(annotations) + 10 * start, "image_id": number, "category_id": label + 1,
                     "bbox": [4 + 20 * (label > 1), 4, 16, 16], "area": 256}
                )  # fmt: skip
        categories = [{"id": i + 1, "name": n, "frequency": "fcrr"[i]} for i, n in enumerate(NAMES)]
        data = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / f"{split}.json").write_text(json.dumps(data))
    return tmp_path


def test_composed_scenes_train_on_base_and_test_on_all() -> None:
    options = {"size": 64, "shapes": ["circle", "ring", "cross"], "digits": ["one", "two", "six"], "flip": "horizontal"}
    found = load_open("composed", None, options, {"train": 3, "test": 4}, seed=5)
    assert (len(found.train), len(found.test)) == (3, 4) and found.train.shape == (3, 64, 64)
    assert found.test.classes == found.train.classes + found.groups["novel"] and found.groups["novel"]
    assert found.train.augmentation is not None and found.train.augmentation.flip == "horizontal"
    assert found.test.augmentation is None and found.verified is None
    assert set(found.groups) == {"base", "novel", "frequent", "common", "rare"}
    other = load_open("composed", None, {**options, "novel_seed": 1}, {"train": 3, "test": 4}, seed=5)
    assert other.groups["novel"] != found.groups["novel"]


@pytest.mark.parametrize("name", ["coco", "lvis", "objects365"])
def test_folders_are_split_into_base_and_novel_classes(folder: Path, name: str) -> None:
    options = {**LISTS, "novel": ["dog"]}
    found = load_open(name, folder, options)
    assert found.train.classes == ("cat", "bus", "cup") and found.test.classes == ("cat", "bus", "cup", "dog")
    assert [len(o.labels) for o in found.train.objects] == [2, 1], "the dog is ground in training"
    assert found.test.objects[1].labels.tolist() == [3, 2] and found.groups["novel"] == ("dog",)
    strict = load_open(name, folder, {**options, "strict": True})
    assert strict.train.names == ("0.png",) and len(strict.test) == 2


def test_lvis_tells_which_classes_are_rare_and_what_was_verified(folder: Path) -> None:
    found = load_open("lvis", folder, LISTS)
    assert found.groups["novel"] == found.groups["rare"] == ("bus", "cup")
    assert found.train.classes == ("cat", "dog") and found.groups["frequent"] == ("cat",)
    assert found.verified is not None and set(found.verified) == {f"{i}.png" for i in range(4)}


def test_a_share_of_novel_classes_is_drawn_by_its_own_seed(folder: Path) -> None:
    drawn = [load_open("coco", folder, {**LISTS, "novel": 0.5, "novel_seed": s}).groups["novel"] for s in range(6)]
    assert all(len(names) == 2 for names in drawn) and len(set(drawn)) > 1
    assert drawn[3] == load_open("coco", folder, {**LISTS, "novel": 0.5, "novel_seed": 3}, seed=7).groups["novel"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("coco", {}, "unknown class 'person'"),
        ("coco", {"novel": ["dig"]}, "novel class 'dig' is unknown.*'dog'"),
        ("coco", {"novel": "rare"}, "rare classes are those of LVIS"),
        ("coco", {"novel": 3}, "novel is a list of names, a share"),
        ("coco", {"novel": 0.01}, "leaves one side empty"),
        ("coco", {"novel": 0.5, "size": [32, 40]}, "multiples of 32 pixels"),
        ("coco", {"novel": 0.5, "strict": 1}, "strict is true or false"),
        ("coco", {"novel": 0.5, "train": ["train.json"]}, "train is a pair"),
        ("coco", {"novel": 0.5, "train": ["none.json", "images"]}, "none.json"),
        ("coco", {"novels": 0.5}, "no option 'novels'.*'novel'"),
    ],
)
def test_what_cannot_be_read_is_told(folder: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((DataError, RecipeError), match=message):
        load_open(name, folder, {**LISTS, **options})


def test_files_with_other_categories_are_told(folder: Path) -> None:
    data = json.loads((folder / "val.json").read_text())
    data["categories"].append({"id": 9, "name": "kite"})
    (folder / "val.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"other categories: \['kite'\] are in one of them only"):
        load_open("coco", folder, {**LISTS, "novel": 0.5})


@pytest.mark.parametrize(
    ("options", "path", "message"),
    [
        ({"size": 50}, None, "multiple of 32"),
        ({"objects": 3}, None, "least and most"),
        ({"shapes": ["sqare"]}, None, "'sqare'.*'square'"),
        ({"novel": "half"}, None, "make no world"),
        ({}, Path(), "read no files"),
    ],
)
def test_composed_scenes_that_cannot_be_are_told(options: dict[str, Any], path: Path | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_open("composed", path, options)
    with pytest.raises(RecipeError, match="unknown source 'composd'.*'composed'"):
        load_open("composd", None, {})
    with pytest.raises(DataError, match="'lvis' needs the folder of its data"):
        load_open("lvis", None, {})
    assert torch.is_tensor(load_open("composed", None, {"size": 64}, {"train": 1, "test": 1}).train.images)
