"""Sources of images with boxes, by name: embedded scenes, folders of VOC and of COCO, and the blood cells of BCCD."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbits.errors import DataError, RecipeError, nearest
from fewbits.tasks.annotations import Annotated, Skipped, class_names, load_examples, read_coco, read_voc
from fewbits.tasks.augment import Augmentation
from fewbits.tasks.data import require_names, shared_data_dir
from fewbits.tasks.detection import DetectionExamples, scene_examples
from fewbits.tasks.scenes import make_scenes

SCENE_COUNTS = {"train": 600, "test": 200}
BCCD_CLASSES = ("RBC", "WBC", "Platelets")
AUGMENTATION = [f.name for f in dataclasses.fields(Augmentation)]


@dataclass(frozen=True)
class Wanted:
    """Options of a source.

    size: height and width that images are scaled to, in pixels. classes: their names in the order of labels; None:
    COCO's own, or those of VOC's train list in alphabetical order. skip_bad: leave out bad boxes and images, and note
    it. VOC: train, test are lists in ImageSets/Main. COCO: train, test are pairs [annotations, images] in the folder.
    """

    size: tuple[int, int]
    classes: tuple[str, ...] | None
    skip_bad: bool
    train: Any
    test: Any


DEFAULTS: dict[str, dict[str, Any]] = {
    "scenes": {"size": 96},
    "voc": {"size": [320, 320], "classes": None, "skip_bad": False, "train": "train", "test": "val"},
    "bccd": {"size": [256, 320], "classes": list(BCCD_CLASSES), "skip_bad": True, "train": "train", "test": "val"},
    "coco": {
        "size": [320, 320],
        "classes": None,
        "skip_bad": False,
        "train": ["annotations/instances_train2017.json", "train2017"],
        "test": ["annotations/instances_val2017.json", "val2017"],
    },
}
Records = dict[str, list[Annotated]]
Loaded = tuple[DetectionExamples, DetectionExamples, tuple[str, ...]]


def load_detection(
    name: str,
    path: Path | None,
    options: Mapping[str, Any],
    counts: Mapping[str, int | None] | None = None,
    seed: int = 0,
) -> Loaded:
    """Load a source; return its training examples (augmented), its test examples, and what a reader must know of them.

    name: scenes, voc, bccd or coco. path: its folder; None where it is embedded or shared. options: ``DEFAULTS``, and
    the fields of ``Augmentation``. counts: how many "train" and "test" examples to use. Raises RecipeError for an
    unknown name or option, DataError for unusable data.
    """
    if name not in DEFAULTS:
        raise RecipeError(f"unknown source {name!r} of detection{nearest(name, DEFAULTS)}; known: {sorted(DEFAULTS)}")
    known = [*DEFAULTS[name], *AUGMENTATION]
    for option in options:
        if option not in known:
            raise RecipeError(f"{name!r} has no option {option!r}{nearest(option, known)}; known: {known}")
    augmentation = Augmentation(**{key: frozen(v) for key, v in options.items() if key in AUGMENTATION})
    given = {**DEFAULTS[name], **{key: value for key, value in options.items() if key not in AUGMENTATION}}
    counts = counts or {}
    if name == "scenes":
        train, test, notes = _scenes(path, given, counts, seed)
    else:
        folder, wanted = _folder(name, path), _wanted(given)
        records, classes = (_read_coco if name == "coco" else _read_voc)(folder, wanted)
        skipped = Skipped(wanted.skip_bad)
        train, test = (
            load_examples(few(records[split], counts.get(split), seed), classes, wanted.size, skipped)
            for split in ("train", "test")
        )
        left_out = f"bad boxes and images that are left out: {len(skipped.notes)}"
        notes = (f"{left_out}, the first: {skipped.notes[0]}",) if skipped.notes else ()
    return dataclasses.replace(train, augmentation=augmentation), test, notes


def _scenes(path: Path | None, given: Mapping[str, Any], counts: Mapping[str, int | None], seed: int) -> Loaded:
    if path is not None:
        raise DataError(f"'scenes' are made and read no files, got path={str(path)!r}; leave it out")
    if type(given["size"]) is not int or given["size"] % 32:
        raise DataError(f"data.options.size of scenes is a multiple of 32 pixels, got {given['size']!r}")
    wanted = {split: counts.get(split) or usual for split, usual in SCENE_COUNTS.items()}
    train, test = (scene_examples(make_scenes(s, n, size=given["size"], seed=seed)) for s, n in wanted.items())
    return train, test, ()


def _read_voc(folder: Path, wanted: Wanted) -> tuple[Records, tuple[str, ...]]:
    lists = {"train": wanted.train, "test": wanted.test}
    records = {split: read_voc(folder, folder / f"ImageSets/Main/{name}.txt") for split, name in lists.items()}
    return records, wanted.classes or class_names(records["train"])


def _read_coco(folder: Path, wanted: Wanted) -> tuple[Records, tuple[str, ...]]:
    for split in (wanted.train, wanted.test):
        if not isinstance(split, tuple) or len(split) != 2 or not all(isinstance(part, str) for part in split):
            raise RecipeError(f"data.options.train and test of coco are pairs [annotations, images], got {split!r}")
    train, classes = read_coco(*(folder / name for name in wanted.train))
    require_names(wanted.classes or classes)
    test, _ = read_coco(*(folder / name for name in wanted.test))
    return {"train": train, "test": test}, wanted.classes or classes


def _wanted(given: Mapping[str, Any]) -> Wanted:
    size = given["size"]
    if not isinstance(size, (list, tuple)) or len(size) != 2 or any(type(v) is not int or v < 32 for v in size):
        raise DataError(f"data.options.size is [height, width] in pixels, at least 32, got {size!r}")
    if given["classes"] is not None:
        require_names(given["classes"])
    if type(given["skip_bad"]) is not bool:
        raise DataError(f"data.options.skip_bad is true or false, got {given['skip_bad']!r}")
    return Wanted(**{key: frozen(value) for key, value in given.items()})


def _folder(name: str, path: Path | None) -> Path:
    shared = shared_data_dir()
    folder = path or (shared / name if name == "bccd" and shared is not None else None)
    if folder is None:
        raise DataError(f"{name!r} needs the folder of its data")
    if not folder.is_dir():
        raise DataError(f"the data folder {str(folder)!r} does not exist or is no folder")
    return folder


def few(records: list[Annotated], count: int | None, seed: int) -> list[Annotated]:
    """Choose by chance, before images are decoded; in the old order."""
    if count is None or count >= len(records):
        return records
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))
    return [records[i] for i in order[:count].sort().values.tolist()]


def frozen(value: Any) -> Any:
    """Return lists, as YAML has them, as tuples."""
    return tuple(value) if isinstance(value, list) else value
