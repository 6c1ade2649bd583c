from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from fewbits.errors import DataError
from fewbits.tasks.annotations import Skipped, load_examples, read_coco
from fewbits.tasks.detection import DetectionExamples, scene_examples
from fewbits.tasks.open_vocabulary.splits import (
    OPEN_VOCABULARY_COCO,
    NovelSplit,
    base_examples,
    novel_split,
    with_classes,
)
from fewbits.tasks.scenes import DIGITS, make_scenes


@pytest.fixture(scope="module")
def scenes() -> DetectionExamples:
    return scene_examples(make_scenes("test", 20, size=64))


def named(examples: DetectionExamples) -> list[list[str]]:
    return [[examples.classes[label] for label in objects.labels.tolist()] for objects in examples.objects]


def test_novel_classes_by_name_keep_the_order() -> None:
    split = novel_split(DIGITS, ["7", "2"])
    assert split.novel == ("2", "7") and split.base == ("0", "1", "3", "4", "5", "6", "8", "9")
    assert split.classes == split.base + split.novel and split.groups == {"base": split.base, "novel": split.novel}


def test_novel_classes_by_share_follow_from_the_seed() -> None:
    split = novel_split(DIGITS, 0.3, seed=1)
    assert len(split.novel) == 3 and sorted(split.classes) == list(DIGITS)
    assert split == novel_split(DIGITS, 0.3, seed=1)
    assert len({novel_split(DIGITS, 0.3, seed=seed) for seed in range(5)}) > 1


def test_objects_of_other_classes_go_and_labels_follow_the_new_order(scenes: DetectionExamples) -> None:
    wanted = ("7", "2", "5")
    found = with_classes(scenes, wanted)
    assert found.classes == wanted and len(found) == len(scenes)
    assert named(found) == [[name for name in names if name in wanted] for names in named(scenes)]
    for before, after, names in zip(scenes.objects, found.objects, named(scenes)):
        keep = torch.tensor([name in wanted for name in names])
        assert torch.equal(after.boxes, before.boxes[keep]) and len(after.crowd) == len(after.areas) == keep.sum()


def test_training_shows_base_classes_and_strictly_no_novel_one(scenes: DetectionExamples) -> None:
    split = novel_split(DIGITS, ["7", "2"])
    loose, strict = base_examples(scenes, split), base_examples(scenes, split, strict=True)
    assert loose.classes == strict.classes == split.base and len(loose) == len(scenes)
    clean = [row for row, names in enumerate(named(scenes)) if not {"7", "2"} & set(names)]
    assert 0 < len(clean) < len(scenes) and strict.names == tuple(scenes.names[row] for row in clean)
    assert named(strict) == [named(scenes)[row] for row in clean]


def test_wrong_splits_are_told(scenes: DetectionExamples) -> None:
    with pytest.raises(DataError, match="'person' is unknown; did you mean 'persons'"):
        novel_split(["persons", "cat"], ["person"])
    with pytest.raises(DataError, match="leaves one side empty"):
        novel_split(DIGITS, 0.01)
    with pytest.raises(DataError, match="one name or more"):
        novel_split(DIGITS, DIGITS)
    with pytest.raises(DataError, match=r"\['b'\] are both"):
        NovelSplit(("a", "b"), ("b",))
    with pytest.raises(DataError, match="unknown class 'seven'"):
        with_classes(scenes, ["seven"])
    with pytest.raises(DataError, match="all 20 images show novel objects"):
        base_examples(scenes, NovelSplit(("x",), DIGITS), strict=True)


@pytest.fixture
def coco(shared: Path, tmp_path: Path) -> DetectionExamples:
    """Real images of COCO; their labels, which are YOLO's, become COCO's JSON."""
    folder = shared / "coco_small"
    if not folder.is_dir():
        pytest.skip("no images of COCO beside the checkout")
    names = yaml.safe_load((folder / "object_detection/config.yaml").read_text())["names"]
    images, annotations = list[dict](), list[dict]()
    for path in sorted((folder / "images/val2017").iterdir())[:30]:
        width, height = Image.open(path).size
        images.append({"id": len(images), "file_name": path.name})
        labels = folder / f"object_detection/labels/val2017/{path.stem}.txt"
        for line in labels.read_text().splitlines() if labels.is_file() else ():
            kind, x, y, w, h = map(float, line.split())
            box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            annotations.append({"id": len(annotations), "image_id": len(images) - 1, "category_id": kind, "bbox": box})
    categories = [{"id": key, "name": name} for key, name in names.items()]
    (tmp_path / "coco.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    records, classes = read_coco(tmp_path / "coco.json", folder / "images/val2017")
    return load_examples(records, classes, (64, 64), Skipped())


def test_the_usual_split_of_coco_on_real_images(coco: DetectionExamples) -> None:
    split = OPEN_VOCABULARY_COCO
    assert len(split.base) == 48 and len(split.novel) == 17 and set(split.classes) < set(coco.classes)
    train = base_examples(coco, split)
    test = with_classes(coco, split.classes)
    assert train.classes == test.classes[:48] and len(train) == len(test) == 30
    shown = {name for names in named(test) for name in names}
    assert shown & set(split.novel) and "person" in shown
    assert named(train) == [[name for name in names if name in split.base] for names in named(coco)]
    assert 0 < len(base_examples(coco, split, strict=True)) < 30
