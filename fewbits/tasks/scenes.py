"""Scenes with known objects: scikit-learn's handwritten digits on textured ground, with boxes, classes and masks.

Every scene is a function of (seed, split, index) alone, and no digit of a test scene is ever seen in training.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fewbits.errors import DataError
from fewbits.train.rng import mix

DIGITS = tuple(str(digit) for digit in range(10))
SPLITS = ("train", "test")
Place = tuple[int, int, int, int]  # corners x1, y1, x2, y2
TEST_SHARE = 5  # every fifth handwritten digit is for test scenes
SMALLEST = 0.18  # side of an object, in sides of the scene
LARGEST = 0.42
TRIES = 20  # places that are tried for an object before it is left out
CONTRAST = 90  # between ink and the ground under it, of 255
INK = 0.35  # of the darkest: from where on a pixel belongs to the digit


@dataclass(frozen=True)
class Scene:
    """One image and what is on it.

    image: uint8 [3, H, W]. boxes: float32 [N, 4], the corners x1, y1, x2, y2 in pixels, tight around the ink; objects
    do not overlap. labels: int64 [N], the digit. mask: int64 [H, W], 0 for the ground and digit + 1 for ink.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    mask: Tensor


def make_scenes(
    split: str, count: int, *, size: int = 96, objects: tuple[int, int] = (1, 5), seed: int = 0
) -> list[Scene]:
    """Return ``count`` scenes of ``split``, train or test; scene i is the same whatever the count.

    size: height and width in pixels. objects: least and most of them in a scene; where there is no place for all,
    there are fewer, but always one. Raises DataError for an unknown split and for numbers that make no scene.
    """
    if split not in SPLITS:
        raise DataError(f"scenes have the splits {SPLITS}, got {split!r}")
    if type(count) is not int or type(size) is not int or count < 1 or size < 48 or not 1 <= objects[0] <= objects[1]:
        raise DataError(
            "scenes need whole numbers, count >= 1, size >= 48 and 1 <= objects[0] <= objects[1], got "
            f"count {count!r}, size {size!r} and objects {objects}"
        )
    return [_scene(split, size, objects, mix(seed, SPLITS.index(split), index)) for index in range(count)]


def _scene(split: str, size: int, objects: tuple[int, int], seed: int) -> Scene:
    generator = Generator().manual_seed(seed)
    digits, labels = digit_crops(split)
    image, mask = ground(size, generator), torch.zeros(size, size, dtype=torch.int64)
    taken, found = list[Place](), list[tuple[list[int], int]]()
    for _ in range(between(*objects, generator)):
        which = between(0, len(digits) - 1, generator)
        place = free_place(size, taken, generator)
        if place is None:
            continue
        taken.append(place)
        found.append((_draw(image, mask, digits[which], int(labels[which]), place, generator), int(labels[which])))
    boxes = torch.tensor([box for box, _ in found], dtype=torch.float32)
    return Scene(image.round().to(torch.uint8), boxes, torch.tensor([label for _, label in found]), mask)


def ground(size: int, generator: Generator) -> Tensor:
    """Return float [3, size, size] in 0..255: a colour with spots and grain of three sizes."""
    colours = 60 + 135 * torch.rand(3, 1, 1, generator=generator).expand(3, size, size)
    for cells, height in ((4, 50.0), (12, 30.0), (size, 12.0)):
        noise = torch.rand(1, 3, cells, cells, generator=generator) - 0.5
        colours = colours + height * F.interpolate(noise, (size, size), mode="bilinear", align_corners=False)[0]
    return colours.clamp(0, 255)


def free_place(size: int, taken: Sequence[Place], generator: Generator) -> Place | None:
    """Return the corners of a square that no taken one touches, or None where none was found."""
    for _ in range(TRIES):
        side = between(round(SMALLEST * size), round(LARGEST * size), generator)
        x, y = between(0, size - side, generator), between(0, size - side, generator)
        if all(x >= right or y >= low or x + side <= left or y + side <= top for left, top, right, low in taken):
            return x, y, x + side, y + side
    return None


def _draw(image: Tensor, mask: Tensor, digit: Tensor, label: int, place: Place, generator: Generator) -> list[int]:
    """Write a digit [8, 8] in 0..1 into image and mask; return the corners around its ink."""
    left, top, right, low = place
    ink = F.interpolate(digit[None, None], (low - top, right - left), mode="bilinear", align_corners=False)[0, 0]
    under = image[:, top:low, left:right]
    level = under.mean((1, 2), keepdim=True)
    up = CONTRAST + 40 * torch.rand(3, 1, 1, generator=generator)
    colour = torch.where(level.mean() > 127, level - up, level + up).clamp(0, 255)
    alpha = ((ink - INK) / 0.2 + 0.5).clamp(0, 1)
    image[:, top:low, left:right] = (1 - alpha) * under + alpha * colour
    inked = ink >= INK
    mask[top:low, left:right][inked] = label + 1
    rows, columns = inked.any(1).nonzero()[:, 0], inked.any(0).nonzero()[:, 0]
    return [left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1]


def between(low: int, high: int, generator: Generator) -> int:
    """Return a whole number by chance, ``high`` among them."""
    return int(torch.randint(low, high + 1, (), generator=generator))


@functools.cache
def digit_crops(split: str) -> tuple[Tensor, Tensor]:
    """Return the handwritten digits of a split: float [N, 8, 8] in 0..1 and int64 [N]."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images, labels = torch.from_numpy(loaded.images).float() / 16, torch.from_numpy(loaded.target).long()
    test = torch.arange(len(labels)) % TEST_SHARE == 0
    chosen = test if split == "test" else ~test
    return images[chosen], labels[chosen]
