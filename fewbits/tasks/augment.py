"""Augmentation of images with boxes: mosaic, windows, flips and colour, on torchvision's transforms v2.

All chance comes from torch's global generator, as in torchvision; ``seeded`` sets it for the while.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fewbits.errors import DataError
from fewbits.tasks.data import is_number

Sample = tuple[Tensor, Tensor, Tensor]  # image uint8 [3, H, W], boxes [N, 4] of corners in pixels, labels int64 [N]
VISIBLE = 0.35  # share of a box that must be left in a window for the object to count
LEAST = 2.0  # pixels of its shorter side
CENTRE = (0.35, 0.65)  # where the four parts of a mosaic meet


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image, in this order.

    mosaic: share of images that are put together from windows of four. scale: least and most magnification of a window;
    where it is wider than the image, the rest is black. flip: none, horizontal, or both (and vertical). colour: jitter
    of brightness, contrast and saturation, 0 to 1. Raises DataError for a value out of range.
    """

    mosaic: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    flip: Literal["none", "horizontal", "both"] = "none"
    colour: float = 0.0

    def __post_init__(self) -> None:
        scale = tuple(self.scale) if isinstance(self.scale, (list, tuple)) else ()
        if len(scale) != 2 or not all(map(is_number, scale)) or not 0 < scale[0] <= scale[1]:
            raise DataError(f"scale is the least and most magnification, such as [0.8, 1.25], got {self.scale!r}")
        if any(not is_number(v) or not 0 <= v <= 1 for v in (self.mosaic, self.colour)):
            raise DataError(f"mosaic and colour are between 0 and 1, got {self.mosaic!r} and {self.colour!r}")
        if self.flip not in ("none", "horizontal", "both"):
            raise DataError(f"flip must be none, horizontal or both, got {self.flip!r}")

    def __call__(self, first: int, count: int, read: Callable[[int], Sample]) -> Sample:
        """Return example ``first`` augmented; ``read`` gives any of ``count``, from which a mosaic takes three more."""
        image, boxes, labels = read(first)
        size = (image.shape[-2], image.shape[-1])
        if float(torch.rand(())) < self.mosaic:
            others = torch.randint(count, (3,)).tolist()
            parts = [(image, boxes, labels), *(read(i) for i in others)]
            image, boxes, labels = mosaic(parts, size, self.scale)
        else:
            image, boxes, labels = window((image, boxes, labels), size, self.scale)
        return self._flip_and_colour(image, boxes, labels)

    def _flip_and_colour(self, image: Tensor, boxes: Tensor, labels: Tensor) -> Sample:
        from torchvision.transforms import v2

        steps: list[Any] = []
        if self.flip != "none":
            steps.append(v2.RandomHorizontalFlip())
        if self.flip == "both":
            steps.append(v2.RandomVerticalFlip())
        if self.colour:
            steps.append(v2.ColorJitter(self.colour, self.colour, self.colour))
        if steps:
            image, boxes = v2.Compose(steps)(*_tv(image, boxes))
        return image.as_subclass(Tensor), boxes.as_subclass(Tensor), labels


def window(sample: Sample, size: tuple[int, int], scale: tuple[float, float]) -> Sample:
    """Cut a random window and scale it to ``size`` (height, width), magnified by a random factor within ``scale``."""
    from torchvision.transforms.v2 import functional as vision

    image, boxes, labels = sample
    if scale == (1.0, 1.0) and tuple(image.shape[-2:]) == size:
        return sample
    factor = math.exp(_uniform(math.log(scale[0]), math.log(scale[1])))
    cut = [max(1, round(side / factor)) for side in size]
    start = [_start(whole, part) for whole, part in zip(image.shape[-2:], cut)]
    image = vision.resized_crop(image, *start, *cut, size=list(size), antialias=True)
    # torchvision would cut boxes at the border, and how much of them is left would be lost
    corner, zoom = (
        torch.tensor([b, a] * 2, dtype=boxes.dtype) for a, b in (start, (size[0] / cut[0], size[1] / cut[1]))
    )
    return _kept(image, (boxes - corner) * zoom, labels, size)


def mosaic(parts: list[Sample], size: tuple[int, int], scale: tuple[float, float]) -> Sample:
    """Put windows of four samples together, which meet at a random point, to one image of ``size``."""
    middle = [round(side * _uniform(*CENTRE)) for side in size]
    canvas = torch.empty(3, *size, dtype=torch.uint8)
    boxes, labels = [], []
    for sample, (low, right) in zip(parts, ((0, 0), (0, 1), (1, 0), (1, 1))):
        top, left = low * middle[0], right * middle[1]
        height = size[0] - middle[0] if low else middle[0]
        width = size[1] - middle[1] if right else middle[1]
        image, found, kinds = window(sample, (height, width), scale)
        canvas[:, top : top + height, left : left + width] = image
        boxes.append(found + torch.tensor([left, top, left, top], dtype=found.dtype))
        labels.append(kinds)
    return canvas, torch.cat(boxes), torch.cat(labels)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set torch's generator on the CPU inside the block, and put it back after it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _kept(image: Tensor, boxes: Tensor, labels: Tensor, size: tuple[int, int]) -> Sample:
    """Cut boxes at the borders; leave out those of which too little is seen."""
    inside = boxes.clone()
    inside[:, 0::2] = inside[:, 0::2].clamp(0, size[1])
    inside[:, 1::2] = inside[:, 1::2].clamp(0, size[0])
    before, after = ((b[:, 2:] - b[:, :2]).clamp(min=0) for b in (boxes, inside))
    keep = (after.prod(1) >= VISIBLE * before.prod(1)) & (after.min(1).values >= LEAST)
    return image, inside[keep], labels[keep]


def _tv(image: Tensor, boxes: Tensor) -> tuple[Any, Any]:
    from torchvision import tv_tensors

    size = (int(image.shape[-2]), int(image.shape[-1]))
    boxed = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
    return tv_tensors.Image(image), boxed


def _start(whole: int, part: int) -> int:
    """Return where a window starts: inside, or, where it is wider than the whole, so that it holds the whole."""
    low, high = sorted((0, whole - part))
    return int(torch.randint(low, high + 1, ()))


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))
