"""Images with boxes, held in memory: what a detector is trained and measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import DataError
from fewbits.tasks.augment import Augmentation, Sample, seeded
from fewbits.tasks.data import Batch, Indices, normalize
from fewbits.tasks.scenes import DIGITS, Scene
from fewbits.tasks.sources import IMAGENET

PADDING = -1.0  # the label of rows that fill up a batch of targets


@dataclass(frozen=True)
class Objects:
    """The objects on one image.

    boxes: float32 [N, 4], corners x1, y1, x2, y2. labels: int64 [N]. crowd: bool [N], groups that are not trained on
    and do not count in COCO's metric. areas: float32 [N], by which COCO tells small from large.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    areas: Tensor

    @staticmethod
    def of(boxes: Tensor, labels: Tensor) -> Objects:
        """Return single objects, whose areas are those of their boxes."""
        sides = boxes[:, 2:] - boxes[:, :2]
        return Objects(boxes, labels, torch.zeros(len(labels), dtype=torch.bool), sides.prod(1))


@dataclass(frozen=True, eq=False, kw_only=True)
class DetectionExamples:
    """Images of one size, with the objects on them.

    images: uint8 [N, 3, H, W]. objects: of each image, in pixels of the image as it was before it was scaled to H x W.
    sizes: int64 [N, 2], height and width before. names: what errors and reports call each image. classes: names in
    the order of labels. mean, std: one value a channel, of pixels in 0..1. augmentation: of training; None: none.
    Raises DataError where there is no image or no class, or a label has no class.
    """

    images: Tensor
    objects: tuple[Objects, ...]
    sizes: Tensor
    names: tuple[str, ...]
    classes: tuple[str, ...]
    mean: Sequence[float] = IMAGENET["mean"]
    std: Sequence[float] = IMAGENET["std"]
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise DataError(f"images must be uint8 [N, 3, H, W], got {self.images.dtype} {list(self.images.shape)}")
        if not len(self.images) == len(self.objects) == len(self.sizes) == len(self.names) or not len(self.images):
            raise DataError(
                f"need at least one image, and objects, a size and a name of each; got {len(self.images)} images, "
                f"{len(self.objects)} objects, {len(self.sizes)} sizes and {len(self.names)} names"
            )
        for name, objects in zip(self.names, self.objects):
            wrong = objects.labels[(objects.labels < 0) | (objects.labels >= len(self.classes))]
            if len(wrong):
                raise DataError(f"{name}: label {int(wrong[0])} is outside 0..{len(self.classes) - 1}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what ``gather`` returns."""
        return 3, int(self.images.shape[2]), int(self.images.shape[3])

    @property
    def scales(self) -> Tensor:
        """What corners x1, y1, x2, y2 on the image are multiplied with to be on the image before scaling, [N, 4]."""
        now = torch.tensor(self.images.shape[-2:])
        return (self.sizes / now).flip(1).repeat(1, 2).float()

    def gather(self, indices: Indices, generator: torch.Generator | None = None) -> Batch:
        """Return float32 normalised images [B, 3, H, W] and targets [B, M, 5]: label, x1, y1, x2, y2 in pixels.

        Rows with the label -1 fill up. Without a generator nothing is augmented; with one, all chance comes from it.
        """
        rows = torch.as_tensor(indices, dtype=torch.int64).tolist()
        if generator is None or self.augmentation is None:
            samples = [self._sample(row) for row in rows]
        else:
            seeds = torch.randint(2**62, (len(rows),), generator=generator).tolist()
            samples = [self._augmented(row, seed) for row, seed in zip(rows, seeds)]
        images = torch.stack([image for image, _, _ in samples])
        return normalize(images, self.mean, self.std), pad([(boxes, labels) for _, boxes, labels in samples])

    def _sample(self, row: int) -> Sample:
        """Return what is trained on: no crowds, and boxes in pixels of the scaled image."""
        objects, scale = self.objects[row], torch.tensor(self.images.shape[-2:]) / self.sizes[row]
        single = ~objects.crowd
        return self.images[row], objects.boxes[single] * scale.flip(0).repeat(2).float(), objects.labels[single]

    def _augmented(self, row: int, seed: int) -> Sample:
        assert self.augmentation is not None
        with seeded(seed):
            return self.augmentation(row, len(self), self._sample)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Iterate once over all examples in order, not augmented; the last batch may be smaller."""
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {batch_size}")
        return (self.gather(chunk) for chunk in torch.split(torch.arange(len(self)), batch_size))

    def select(self, indices: Indices) -> DetectionExamples:
        """Return a data set of these examples only, in this order."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return dataclasses.replace(
            self,
            images=self.images[rows],
            objects=tuple(self.objects[i] for i in rows.tolist()),
            sizes=self.sizes[rows],
            names=tuple(self.names[i] for i in rows.tolist()),
        )

    def subset(self, n: int, seed: int = 0) -> DetectionExamples:
        """Return n examples by chance, in their order. Raises DataError unless 1 <= n <= len(self)."""
        if not 1 <= n <= len(self):
            raise DataError(f"cannot take {n} of {len(self)} examples; ask for 1 to {len(self)}")
        return self.select(self._shuffled(seed)[:n].sort().values)

    def split(self, fraction: float, seed: int = 0) -> tuple[DetectionExamples, DetectionExamples]:
        """Return two disjoint sets by chance: ``fraction`` of the examples, and the others."""
        n = round(fraction * len(self))
        if not 1 <= n < len(self):
            raise DataError(f"fraction {fraction} of {len(self)} examples leaves one side empty; choose within 0..1")
        order = self._shuffled(seed)
        return self.select(order[:n].sort().values), self.select(order[n:].sort().values)

    def _shuffled(self, seed: int) -> Tensor:
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))


def pad(found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return boxes and labels of several images as one tensor [B, M, 5], M at least 1; see ``gather``."""
    targets = torch.full((len(found), max([1, *(len(labels) for _, labels in found)]), 5), PADDING)
    for row, (boxes, labels) in zip(targets, found):
        row[: len(labels), 0], row[: len(labels), 1:] = labels.float(), boxes
    return targets


def scene_examples(scenes: Sequence[Scene], classes: Sequence[str] = DIGITS, **fields: Any) -> DetectionExamples:
    """Return scenes as examples of detection. fields: further ones of ``DetectionExamples``."""
    images = torch.stack([scene.image for scene in scenes])
    return DetectionExamples(
        images=images,
        objects=tuple(Objects.of(scene.boxes, scene.labels) for scene in scenes),
        sizes=torch.tensor(images.shape[-2:]).repeat(len(scenes), 1),
        names=tuple(f"scene {i}" for i in range(len(scenes))),
        classes=tuple(classes),
        **fields,
    )
