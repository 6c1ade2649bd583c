"""Images in a tree of class folders, decoded when they are asked for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.errors import DataError
from fewbits.tasks.data import Batch, Indices, LabelledImages, normalize

CROP_RATIOS = (3 / 4, 4 / 3)


@dataclass(frozen=True, eq=False, kw_only=True)
class FolderExamples(LabelledImages):
    """Labelled RGB images that stay on disk until ``gather`` reads them, on ``workers`` threads.

    Evaluation scales the shorter side to ``resize`` pixels (default: size / 0.875) and cuts the centre
    of ``size`` x ``size``. Training cuts a random window of ``min_crop_area`` to 1 of the area, at an aspect
    ratio of 3/4 to 4/3, scales it to ``size`` and, with ``flip``, mirrors half of the images.
    """

    files: Sequence[str]
    size: int = 224
    resize: int | None = None
    min_crop_area: float = 0.08
    flip: bool = True
    workers: int = 4

    def __post_init__(self) -> None:
        if self.size < 1 or (self.resize is not None and self.resize < self.size):
            raise DataError(f"need 1 <= size <= resize, in pixels; got size={self.size}, resize={self.resize}")
        if not 0 < self.min_crop_area <= 1:
            raise DataError(f"min_crop_area must be in (0, 1], got {self.min_crop_area}")
        if self.workers < 1:
            raise DataError(f"workers must be at least 1, got {self.workers}")
        super().__post_init__()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what ``gather`` returns."""
        return 3, self.size, self.size

    def gather(self, indices: Indices, generator: torch.Generator | None = None) -> Batch:
        """See ``LabelledImages.gather``. Raises DataError, naming the file, for one that does not decode."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        files = [self.files[i] for i in rows.tolist()]
        # All draws come before the threads start, so their order of finishing cannot change the result.
        draws = [None] * len(files) if generator is None else torch.rand(len(files), 5, generator=generator).tolist()
        with ThreadPoolExecutor(self.workers) as pool:
            images = torch.stack(list(pool.map(self._read, files, draws)))
        return normalize(images, self.mean, self.std), self.labels[rows]

    def select(self, indices: Indices) -> FolderExamples:
        """See ``LabelledImages.select``."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        files = [self.files[i] for i in rows.tolist()]
        return dataclasses.replace(self, files=files, labels=self.labels[rows], groups=self.chosen(rows))

    def _read(self, file: str, draws: list[float] | None) -> Tensor:
        from torchvision.datasets.folder import pil_loader

        try:
            image = pil_loader(file)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"cannot decode the image {file!r}: {error}; remove or repair it") from error
        image = self._centre(image) if draws is None else self._augment(image, draws)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def _centre(self, image: Any) -> Any:
        from torchvision.transforms import functional as vision

        shorter = round(self.size / 0.875) if self.resize is None else self.resize
        return vision.center_crop(vision.resize(image, shorter), [self.size, self.size])

    def _augment(self, image: Any, draws: list[float]) -> Any:
        from torchvision.transforms import functional as vision

        top, left, height, width = random_window(image.height, image.width, self.min_crop_area, draws)
        image = vision.resized_crop(image, top, left, height, width, [self.size, self.size])
        return vision.hflip(image) if self.flip and draws[4] < 0.5 else image


def random_window(height: int, width: int, min_area: float, draws: Sequence[float]) -> tuple[int, int, int, int]:
    """Turn four uniform draws (area, ratio, top, left) into a window (top, left, height, width) in pixels."""
    area = height * width * (min_area + draws[0] * (1 - min_area))
    low, high = (math.log(r) for r in CROP_RATIOS)
    ratio = math.exp(low + draws[1] * (high - low))
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    return int(draws[2] * (height - h + 1)), int(draws[3] * (width - w + 1)), h, w


def list_images(folder: Path, classes: Sequence[str] | None = None) -> tuple[list[str], Tensor, tuple[str, ...]]:
    """List an ImageFolder tree ``folder/<class>/<image>``: files, int64 labels [N], class names.

    With ``classes`` the labels are indices into it, whichever of them the tree holds. Raises DataError for a
    tree that is empty, has an empty class, or a class that is not in ``classes``.
    """
    from torchvision.datasets import ImageFolder

    try:
        tree = ImageFolder(str(folder))
    except OSError as error:
        raise DataError(f"{str(folder)!r} is no tree of class folders with images: {error}") from error
    names = tuple(tree.classes) if classes is None else tuple(classes)
    for name in tree.classes:
        if name not in names:
            raise DataError(f"{str(folder)!r} has the class {name!r}, which is not among {list(names)}")
    labels = torch.tensor([names.index(tree.classes[label]) for _, label in tree.samples], dtype=torch.int64)
    return [file for file, _ in tree.samples], labels, names
