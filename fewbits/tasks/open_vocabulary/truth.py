"""What a detector is measured by: the objects on each image, and which classes were looked for there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import DataError, nearest
from fewbits.tasks.annotations import Annotated, Box
from fewbits.tasks.detection import DetectionExamples, Objects


@dataclass(frozen=True)
class Verified:
    """What annotators of a federated data set (LVIS) know of one image, beside the objects that they marked.

    absent: classes that they looked for and that are not there. partial: classes some of whose objects may not be
    marked. Nothing is known of classes that are neither marked nor absent.
    """

    absent: frozenset[str] = frozenset()
    partial: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Truth:
    """The objects of images, in pixels of the images before scaling.

    names: of the images. classes: names in the order of labels. verified: by the names of images; None: each class was
    looked for on each image, and all of its objects are marked. Raises DataError where an image is not verified.
    """

    objects: tuple[Objects, ...]
    names: tuple[str, ...]
    classes: tuple[str, ...]
    verified: Mapping[str, Verified] | None = None

    def __post_init__(self) -> None:
        missing = [name for name in self.names if self.verified is not None and name not in self.verified]
        if missing:
            raise DataError(
                f"nothing tells which classes were looked for on {len(missing)} of {len(self.names)} images, the "
                f"first: {missing[0]!r}; give an entry of each, or verified=None where all classes were"
            )

    @staticmethod
    def of(examples: DetectionExamples, verified: Mapping[str, Verified] | None = None) -> Truth:
        """Return that of examples."""
        return Truth(examples.objects, examples.names, examples.classes, verified)

    @staticmethod
    def of_records(
        records: Sequence[Annotated], classes: Sequence[str], verified: Mapping[str, Verified] | None = None
    ) -> Truth:
        """Return that of what a reader read; images are not opened. Raises DataError for an unknown class."""
        labels = {name: label for label, name in enumerate(classes)}
        objects = tuple(_objects(record, labels) for record in records)
        return Truth(objects, tuple(record.image.name for record in records), tuple(classes), verified)

    def looked_for(self) -> tuple[Tensor, Tensor]:
        """Return where a detection counts at all, and where a wrong one does not, each bool [images, classes]."""
        shape, labels = (len(self.names), len(self.classes)), {name: i for i, name in enumerate(self.classes)}
        if self.verified is None:
            return torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        counts, partial = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for row, (name, objects) in enumerate(zip(self.names, self.objects)):
            known = self.verified[name]
            counts[row, objects.labels] = True
            counts[row, [labels[c] for c in known.absent if c in labels]] = True
            partial[row, [labels[c] for c in known.partial if c in labels]] = True
        return counts, partial


def _objects(record: Annotated, labels: Mapping[str, int]) -> Objects:
    corners = torch.tensor([box.corners for box in record.boxes], dtype=torch.float32).reshape(-1, 4)
    found = Objects.of(corners, torch.tensor([_label(box, labels, record) for box in record.boxes], dtype=torch.int64))
    areas = [float(area) if box.area is None else box.area for box, area in zip(record.boxes, found.areas)]
    crowd = torch.tensor([box.crowd for box in record.boxes], dtype=torch.bool)
    return Objects(corners, found.labels, crowd, torch.tensor(areas, dtype=torch.float32))


def _label(box: Box, labels: Mapping[str, int], record: Annotated) -> int:
    if box.name not in labels:
        raise DataError(
            f"{record.source}: {box.name!r} on {record.image.name} is an unknown class{nearest(box.name, labels)}; "
            f"known: {list(labels)[:20]}"
        )
    return labels[box.name]
