"""Data of an open-vocabulary detector by name: composed scenes, and folders of COCO, LVIS and Objects365 with a split.

Training examples have the base classes, test examples these and then the novel ones: a base class has one label.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewbits.errors import DataError, RecipeError, nearest
from fewbits.tasks.annotations import Annotated, Skipped, load_examples, read_coco
from fewbits.tasks.augment import Augmentation
from fewbits.tasks.detection import DetectionExamples
from fewbits.tasks.detection_sources import AUGMENTATION, few, frozen
from fewbits.tasks.open_vocabulary.composed import composed_examples
from fewbits.tasks.open_vocabulary.federated import read_lvis, read_objects365
from fewbits.tasks.open_vocabulary.splits import (
    OPEN_VOCABULARY_COCO,
    NovelSplit,
    base_examples,
    novel_split,
    with_classes,
)
from fewbits.tasks.open_vocabulary.truth import Verified
from fewbits.tasks.open_vocabulary.words import Groups, World

SCENE_COUNTS = {"train": 4000, "test": 400}
OF_COCO, OF_LVIS = "coco-48-17", "rare"  # names of novel splits
FOLDER = {"size": [320, 320], "skip_bad": False, "strict": False, "novel_seed": 0}
VAL, TRAIN = "annotations/instances_val2017.json", "annotations/instances_train2017.json"
DEFAULTS: dict[str, dict[str, Any]] = {
    "composed": {
        "size": 128,
        "objects": [1, 5],
        "novel_seed": 0,
        **{f.name: f.default for f in dataclasses.fields(World) if f.name != "seed"},
    },
    "coco": {"train": [TRAIN, "train2017"], "test": [VAL, "val2017"], "novel": OF_COCO, **FOLDER},
    "lvis": {"train": ["lvis_v1_train.json", "."], "test": ["lvis_v1_val.json", "."], "novel": OF_LVIS, **FOLDER},
    "objects365": {"train": ["train.json", "train"], "test": ["val.json", "val"], "novel": 0.2, **FOLDER},
}


@dataclass(frozen=True)
class OpenData:
    """train: of the base classes, augmented. test: of all. groups: names of classes by group, base and novel among
    them. verified: of LVIS, see ``Truth``; None: all is marked. notes: what a reader must know."""

    train: DetectionExamples
    test: DetectionExamples
    groups: Groups
    verified: Mapping[str, Verified] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Read:
    """What JSON files hold: images by split, classes, and what LVIS knows beyond them."""

    records: dict[str, list[Annotated]]
    classes: tuple[str, ...]
    groups: Groups = field(default_factory=dict)
    verified: Mapping[str, Verified] | None = None


def load_open(
    name: str,
    path: Path | None,
    options: Mapping[str, Any],
    counts: Mapping[str, int | None] | None = None,
    seed: int = 0,
) -> OpenData:
    """Load a source: composed, coco, lvis or objects365.

    path: its folder; None where it is made. options: ``DEFAULTS`` and the fields of ``Augmentation``. counts: how many
    "train" and "test" examples to use. Raises RecipeError for an unknown name or option, DataError for unusable data.
    """
    if name not in DEFAULTS:
        raise RecipeError(f"unknown source {name!r} of open_vocabulary{nearest(name, DEFAULTS)}; known: {[*DEFAULTS]}")
    known = [*DEFAULTS[name], *AUGMENTATION]
    for option in options:
        if option not in known:
            raise RecipeError(f"{name!r} has no option {option!r}{nearest(option, known)}; known: {known}")
    augmentation = Augmentation(**{key: frozen(v) for key, v in options.items() if key in AUGMENTATION})
    given = {key: frozen(options.get(key, value)) for key, value in DEFAULTS[name].items()}
    found = (_composed if name == "composed" else _folder)(name, path, given, counts or {}, seed)
    return dataclasses.replace(found, train=dataclasses.replace(found.train, augmentation=augmentation))


def _composed(
    name: str, path: Path | None, given: dict[str, Any], counts: Mapping[str, int | None], seed: int
) -> OpenData:
    if path is not None:
        raise DataError(f"{name!r} scenes are made and read no files, got path={str(path)!r}; leave it out")
    size, objects = given.pop("size"), given.pop("objects")
    if type(size) is not int or size % 32:
        raise DataError(f"data.options.size of {name} is a multiple of 32 pixels, got {size!r}")
    if not isinstance(objects, tuple) or len(objects) != 2 or any(type(n) is not int for n in objects):
        raise DataError(f"data.options.objects is the least and most of a scene, such as [1, 5], got {objects!r}")
    try:
        world = World(seed=given.pop("novel_seed"), **given)
    except TypeError as error:
        raise DataError(f"data.options of {name} make no world: {error}") from error
    train, test = (
        composed_examples(world, split, counts.get(split) or usual, size=size, objects=objects, seed=seed)
        for split, usual in SCENE_COUNTS.items()
    )
    return OpenData(train, test, world.groups)


def _folder(
    name: str, path: Path | None, given: dict[str, Any], counts: Mapping[str, int | None], seed: int
) -> OpenData:
    if path is None:
        raise DataError(f"{name!r} needs the folder of its data")
    if not path.is_dir():
        raise DataError(f"the data folder {str(path)!r} does not exist or is no folder")
    _check(given)
    read, skipped = _read(name, path, given), Skipped(given["skip_bad"])
    split = _split(read, given)
    train, test = (
        load_examples(few(read.records[s], counts.get(s), seed), read.classes, given["size"], skipped)
        for s in ("train", "test")
    )
    groups = {**split.groups, **{key: names for key, names in read.groups.items() if set(names) <= set(split.classes)}}
    left_out = f"bad boxes and images that are left out: {len(skipped.notes)}"
    notes = (f"{left_out}, the first: {skipped.notes[0]}",) if skipped.notes else ()
    base = base_examples(train, split, strict=given["strict"])
    return OpenData(base, with_classes(test, split.classes), groups, read.verified, notes)


def _read(name: str, folder: Path, given: Mapping[str, Any]) -> _Read:
    pairs = {split: [folder / part for part in given[split]] for split in ("train", "test")}
    if name == "lvis":
        train, test = (read_lvis(*pairs[split]) for split in pairs)
        records = {"train": train.records, "test": test.records}
        classes = _same(train.classes, test.classes)
        return _Read(records, classes, test.groups, {**train.verified, **test.verified})
    read = read_objects365 if name == "objects365" else read_coco
    (train_records, classes), (test_records, others) = (read(*pairs[split]) for split in pairs)
    return _Read({"train": train_records, "test": test_records}, _same(classes, others))


def _same(classes: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    if set(classes) != set(others):
        apart = sorted(set(classes) ^ set(others))
        raise DataError(f"training and test files list other categories: {apart[:10]} are in one of them only")
    return classes


def _split(read: _Read, given: Mapping[str, Any]) -> NovelSplit:
    novel = given["novel"]
    if novel == OF_COCO:
        return OPEN_VOCABULARY_COCO
    if novel == OF_LVIS and OF_LVIS not in read.groups:
        raise DataError("data.options.novel: rare classes are those of LVIS; give names, or a share such as 0.2")
    return novel_split(read.classes, read.groups[OF_LVIS] if novel == OF_LVIS else novel, given["novel_seed"])


def _check(given: Mapping[str, Any]) -> None:
    size, novel = given["size"], given["novel"]
    if not isinstance(size, tuple) or len(size) != 2 or any(type(v) is not int or v < 32 or v % 32 for v in size):
        raise DataError(f"data.options.size is [height, width] in multiples of 32 pixels, got {size!r}")
    for key in ("skip_bad", "strict"):
        if type(given[key]) is not bool:
            raise DataError(f"data.options.{key} is true or false, got {given[key]!r}")
    if novel not in (OF_COCO, OF_LVIS) and not isinstance(novel, (float, tuple)):
        raise DataError(
            f"data.options.novel is a list of names, a share such as 0.2, {OF_COCO!r} or {OF_LVIS!r}, got {novel!r}"
        )
    for split in ("train", "test"):
        pair: Sequence[Any] = given[split] if isinstance(given[split], tuple) else ()
        if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise RecipeError(f"data.options.{split} is a pair [annotations, images], got {given[split]!r}")
