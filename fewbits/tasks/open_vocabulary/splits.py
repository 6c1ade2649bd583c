"""Which classes training shows (base) and which only the test does (novel)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fewbits.errors import DataError, nearest
from fewbits.tasks.data import require_names
from fewbits.tasks.detection import DetectionExamples, Objects
from fewbits.tasks.open_vocabulary.words import Groups

COCO_NOVEL = (  # Bansal et al., Zero-Shot Object Detection, 2018: 48 base and 17 novel classes; 15 are not used
    *("airplane", "bus", "cat", "dog", "cow", "elephant", "umbrella", "tie", "snowboard", "skateboard", "cup"),
    *("knife", "cake", "couch", "keyboard", "sink", "scissors"),
)
COCO_BASE = (
    *("person", "bicycle", "car", "motorcycle", "train", "truck", "boat", "bench", "bird", "horse", "sheep", "bear"),
    *("zebra", "giraffe", "backpack", "handbag", "suitcase", "frisbee", "skis", "kite", "surfboard", "bottle", "fork"),
    *("spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "pizza", "donut", "chair", "bed"),
    *("toilet", "tv", "laptop", "mouse", "remote", "microwave", "oven", "toaster", "refrigerator", "book", "clock"),
    *("vase", "toothbrush"),
)


@dataclass(frozen=True)
class NovelSplit:
    """Names of base and of novel classes. Raises DataError where one is in both or twice, or one side is empty."""

    base: tuple[str, ...]
    novel: tuple[str, ...]

    def __post_init__(self) -> None:
        require_names(self.base)
        require_names(self.novel)
        if both := set(self.base) & set(self.novel):
            raise DataError(f"{sorted(both)} are both base and novel classes; leave them out of one")

    @property
    def classes(self) -> tuple[str, ...]:
        """Base classes, then novel ones: the label of a base class is the same with and without the novel ones."""
        return self.base + self.novel

    @property
    def groups(self) -> Groups:
        """For ``fixed_ap`` and ``group_means``."""
        return {"base": self.base, "novel": self.novel}


OPEN_VOCABULARY_COCO = NovelSplit(COCO_BASE, COCO_NOVEL)


def novel_split(classes: Sequence[str], novel: Sequence[str] | float, seed: int = 0) -> NovelSplit:
    """Split classes. novel: their names (such as the rare ones of LVIS), or their share, drawn by ``seed``.

    Raises DataError for an unknown name, and a share that leaves one side empty.
    """
    if isinstance(novel, float):
        count = round(novel * len(classes))
        if not 1 <= count < len(classes):
            raise DataError(f"a share of {novel} novel ones of {len(classes)} classes leaves one side empty")
        order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
        novel = [classes[i] for i in order[:count].tolist()]
    for name in novel:
        if name not in classes:
            raise DataError(f"the novel class {name!r} is unknown{nearest(name, classes)}; known: {list(classes)[:20]}")
    chosen = set(novel)
    return NovelSplit(tuple(c for c in classes if c not in chosen), tuple(c for c in classes if c in chosen))


def with_classes(examples: DetectionExamples, classes: Sequence[str]) -> DetectionExamples:
    """Return the examples with these classes, in this order of labels, and without the objects of others.

    Raises DataError for a class that the examples do not know.
    """
    require_names(classes)
    for name in classes:
        if name not in examples.classes:
            raise DataError(f"unknown class {name!r}{nearest(name, examples.classes)}; see the examples' classes")
    places = {name: label for label, name in enumerate(classes)}
    labels = torch.tensor([places.get(name, -1) for name in examples.classes])
    objects = tuple(_relabelled(o, labels[o.labels]) for o in examples.objects)
    return dataclasses.replace(examples, objects=objects, classes=tuple(classes))


def base_examples(examples: DetectionExamples, split: NovelSplit, *, strict: bool = False) -> DetectionExamples:
    """Return what is trained on: the base classes and their objects.

    Images that show novel objects stay in, and what is novel on them is ground, as is usual on COCO; with ``strict``
    such images are left out, so that nothing novel is ever seen. Raises DataError where no image is left.
    """
    if strict:
        novel = torch.tensor([name in split.novel for name in examples.classes])
        rows = [row for row, o in enumerate(examples.objects) if not novel[o.labels].any()]
        if not rows:
            raise DataError(
                f"all {len(examples)} images show novel objects; name fewer novel classes, or do without strict"
            )
        examples = examples.select(rows)
    return with_classes(examples, split.base)


def _relabelled(objects: Objects, labels: torch.Tensor) -> Objects:
    keep = labels >= 0
    return Objects(objects.boxes[keep], labels[keep], objects.crowd[keep], objects.areas[keep])
