"""Labelled images: what every classification source returns, and the in-memory data set.

Anything with ``__len__`` and ``gather`` can be trained on; the classes here add what evaluation, calibration
and subsampling need.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import DataError

Batch = tuple[Tensor, Tensor]
Indices = Sequence[int] | Tensor
Self = TypeVar("Self", bound="LabelledImages")


def shared_data_dir() -> Path | None:
    """Return ``../shared/data`` beside the checkout that holds fewbits, or None where there is none."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data"
    return folder if folder.is_dir() else None


def require_names(classes: Any) -> None:
    """Raise DataError unless these are the names of classes: a list of strings, none of them twice."""
    if not isinstance(classes, (list, tuple)) or not all(isinstance(name, str) for name in classes):
        raise DataError(f"classes is a list of names, such as [cat, dog], got {classes!r}")
    if len(set(classes)) < len(classes) or not classes:
        raise DataError(f"classes are one name or more, each once, got {list(classes)}")


def is_number(value: Any) -> bool:
    """Tell whether an option is a number, and neither text nor a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return ``(images / 255 - mean) / std`` per channel as float32; images: uint8 [B, C, H, W]."""
    centre, spread = (255 * torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, std))
    return images.to(torch.float32).sub_(centre).div_(spread)


def stratified_indices(labels: Tensor, n: int, seed: int) -> Tensor:
    """Choose n indices with every class at its share of ``labels`` (to within one); sorted, int64 [n].

    labels: int64 [N]. The same seed chooses the same indices. Raises DataError unless 1 <= n <= N.
    """
    total = len(labels)
    if not 1 <= n <= total:
        raise DataError(f"cannot take {n} of {total} examples; ask for 1 to {total}")
    wanted = n * torch.bincount(labels)
    quotas = wanted // total
    largest_remainders = (wanted % total).argsort(descending=True, stable=True)
    quotas[largest_remainders[: n - int(quotas.sum())]] += 1
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    chosen = [order[labels[order] == c][:quota] for c, quota in enumerate(quotas.tolist())]
    return torch.cat(chosen).sort().values


@dataclass(frozen=True, eq=False, kw_only=True)
class LabelledImages(abc.ABC):
    """Images of which each has one of ``classes``.

    labels: int64 [N]; classes: names in index order; mean, std: one value a channel, of pixels in 0..1. groups: whom
    each image shows, int64 [N], an index into group_names, or -1 where that is not known; None: nobody asked.
    Raises DataError where there is no example, fewer than two classes, or a label without a class.
    """

    labels: Tensor
    classes: tuple[str, ...]
    mean: Sequence[float]
    std: Sequence[float]
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.labels.ndim != 1 or self.labels.dtype != torch.int64:
            raise DataError(f"labels must be int64 [N], got {self.labels.dtype} {list(self.labels.shape)}")
        if len(self.labels) == 0:
            raise DataError("the data set is empty; expected at least one labelled image")
        if len(self.classes) < 2:
            raise DataError(f"classification needs at least two classes, got only {list(self.classes)}")
        outside = (self.labels < 0) | (self.labels >= len(self.classes))
        if outside.any():
            index = int(outside.nonzero()[0])
            raise DataError(
                f"label {int(self.labels[index])} of example {index} is outside 0..{len(self.classes) - 1} "
                f"({len(self.classes)} classes); correct the label or list its class"
            )
        if self.groups is not None and (
            self.groups.shape != self.labels.shape or int(self.groups.max()) >= len(self.group_names)
        ):
            raise DataError(
                f"groups {list(self.groups.shape)} must be one index a label {list(self.labels.shape)}, below the "
                f"{len(self.group_names)} groups {list(self.group_names)}"
            )
        if not len(self.mean) == len(self.std) == self.shape[0] or min(self.std) <= 0:
            raise DataError(
                f"images have {self.shape[0]} channels, but mean={list(self.mean)} and std={list(self.std)}; "
                "give one value a channel, and std above 0"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what ``gather`` returns."""

    @abc.abstractmethod
    def gather(self, indices: Indices, generator: torch.Generator | None = None) -> Batch:
        """Return float32 normalised images [B, C, H, W] and int64 labels [B].

        Without a generator nothing is augmented; with one, augmentation depends on it alone.
        """

    @abc.abstractmethod
    def select(self: Self, indices: Indices) -> Self:
        """Return a data set of these examples only, in this order."""

    @property
    def strata(self) -> Tensor:
        """What subsets and splits are stratified by, int64 [N]: the class, and the group where there are some."""
        if self.groups is None:
            return self.labels
        return self.labels * (len(self.group_names) + 1) + self.groups + 1

    def subset(self: Self, n: int, seed: int = 0) -> Self:
        """Return n examples, stratified by class and group. Raises DataError unless 1 <= n <= len(self)."""
        return self.select(stratified_indices(self.strata, n, seed))

    def split(self: Self, fraction: float, seed: int = 0) -> tuple[Self, Self]:
        """Return two disjoint sets, stratified by class and group: ``fraction`` of the examples, and the others."""
        n = round(fraction * len(self))
        if not 1 <= n < len(self):
            raise DataError(f"fraction {fraction} of {len(self)} examples leaves one side empty; choose within 0..1")
        first = stratified_indices(self.strata, n, seed)
        others = torch.ones(len(self), dtype=torch.bool)
        others[first] = False
        return self.select(first), self.select(others.nonzero()[:, 0])

    def chosen(self, rows: Tensor) -> Tensor | None:
        """Return the groups of these examples."""
        return None if self.groups is None else self.groups[rows]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Iterate once over all examples in order, not augmented; the last batch may be smaller."""
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {batch_size}")
        return (self.gather(chunk) for chunk in torch.split(torch.arange(len(self)), batch_size))


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageExamples(LabelledImages):
    """Labelled images held in memory.

    images: uint8 [N, C, H, W]. Augmentation: ``crop_padding`` pixels of black around each image, from which
    a random window of the old size is cut; ``flip`` mirrors every second image, by chance, left to right.
    """

    images: Tensor
    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(f"images must be uint8 [N, C, H, W], got {self.images.dtype} {list(self.images.shape)}")
        if len(self.images) != len(self.labels):
            raise DataError(f"{len(self.images)} images but {len(self.labels)} labels; give one label an image")
        if self.crop_padding < 0:
            raise DataError(f"crop_padding must be at least 0 pixels, got {self.crop_padding}")
        super().__post_init__()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def gather(self, indices: Indices, generator: torch.Generator | None = None) -> Batch:
        """See ``LabelledImages.gather``."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        images = self.images[rows]
        if generator is not None and (self.crop_padding or self.flip):
            images = crop_and_flip(images, self.crop_padding, self.flip, generator)
        return normalize(images, self.mean, self.std), self.labels[rows]

    def select(self, indices: Indices) -> ImageExamples:
        """See ``LabelledImages.select``."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows], groups=self.chosen(rows))


def crop_and_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by up to ``padding`` pixels, filling with 0, and mirror half of them if ``flip``.

    images: [B, C, H, W]; the result has the same shape and dtype. One gather serves both augmentations.
    """
    count, channels, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    pixels = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    padded = F.pad(images, (padding,) * 4).flatten(2)
    return padded.gather(2, pixels.reshape(count, 1, -1).expand(-1, channels, -1)).reshape(images.shape)
