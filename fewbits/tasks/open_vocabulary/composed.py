"""Scenes of objects that words compose: shapes x colours x textures, and handwritten digits x colours.

Every scene is a function of (world, seed, split, index) alone. Training scenes show the base classes of a ``World``
with its long tail; test scenes show all classes equally often, with digits that no training scene has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fewbits.errors import DataError
from fewbits.tasks.detection import DetectionExamples, scene_examples
from fewbits.tasks.open_vocabulary.words import NUMBERS, Composition, World
from fewbits.tasks.scenes import INK, SPLITS, Place, Scene, between, digit_crops, free_place, ground
from fewbits.train.rng import mix

STREAM = 0xC0  # apart from the seeds of other scenes
RGB = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 190),
    "cyan": (50, 205, 210),
    "orange": (240, 135, 35),
}
SHADE = 12.0  # by which a colour varies, of 255
DARK = 0.35  # of the colour: the second tone of a texture
GREY = 0.2  # what is left of the ground's own colour, so that it is never that of an object
PERIODS = 2.0  # of a texture, in half an object
OUTLINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of x, y in -1..1: whether it is inside
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: (x.abs() <= 1) & (y.abs() <= 1),
    "triangle": lambda x, y: y >= 2 * x.abs() - 1,
    "cross": lambda x, y: torch.minimum(x.abs(), y.abs()) <= 1 / 3,
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.3),
    "diamond": lambda x, y: x.abs() + y.abs() <= 1,
}
PATTERNS: dict[str | None, Callable[[Tensor, Tensor], Tensor]] = {  # of x, y in periods: whether it is dark
    None: lambda x, y: torch.zeros_like(x, dtype=torch.bool),  # digits
    "solid": lambda x, y: torch.zeros_like(x, dtype=torch.bool),
    "striped": lambda x, y: x % 1 < 0.5,
    "dotted": lambda x, y: (x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2 < 0.09,
    "checkered": lambda x, y: (x % 1 < 0.5) == (y % 1 < 0.5),
}


def composed_examples(
    world: World,
    split: str,
    count: int,
    *,
    size: int = 128,
    objects: tuple[int, int] = (1, 5),
    seed: int = 0,
    **fields: Any,
) -> DetectionExamples:
    """Return ``count`` scenes of ``split``, train or test; scene i is the same whatever the count.

    The classes are texts: those of training the base classes, those of test all, base ones first with the same
    labels. size: height and width in pixels. objects: least and most of them in a scene; where there is no place for
    all, there are fewer, but always one. fields: further ones of ``DetectionExamples``. Raises DataError for an
    unknown split and for numbers that make no scene.
    """
    scenes = compose(world, split, count, size=size, objects=objects, seed=seed)
    shown = world.base if split == "train" else world.classes
    return scene_examples(scenes, [composition.name for composition in shown], **fields)


def compose(
    world: World, split: str, count: int, *, size: int = 128, objects: tuple[int, int] = (1, 5), seed: int = 0
) -> list[Scene]:
    """Return the scenes of ``composed_examples``; their labels index ``world.classes``."""
    if split not in SPLITS:
        raise DataError(f"scenes have the splits {SPLITS}, got {split!r}")
    if type(count) is not int or type(size) is not int or count < 1 or size < 48 or not 1 <= objects[0] <= objects[1]:
        raise DataError(
            "scenes need whole numbers, count >= 1, size >= 48 and 1 <= objects[0] <= objects[1], got "
            f"count {count!r}, size {size!r} and objects {objects}"
        )
    part = SPLITS.index(split)
    return [_scene(world, split, size, objects, mix(STREAM, seed, part, index)) for index in range(count)]


def _scene(world: World, split: str, size: int, objects: tuple[int, int], seed: int) -> Scene:
    generator = Generator().manual_seed(seed)
    shares = torch.tensor(world.shares) if split == "train" else torch.ones(len(world.classes))
    wanted = torch.multinomial(shares, between(*objects, generator), replacement=True, generator=generator).tolist()
    image, mask = _grey(ground(size, generator)), torch.zeros(size, size, dtype=torch.int64)
    taken, boxes, labels = list[Place](), list[list[int]](), list[int]()
    for label in wanted:
        place = free_place(size, taken, generator)
        if place is not None:
            taken.append(place)
            boxes.append(_draw(image, mask, world.classes[label], label, split, place, generator))
            labels.append(label)
    return Scene(image.round().to(torch.uint8), torch.tensor(boxes, dtype=torch.float32), torch.tensor(labels), mask)


def _grey(image: Tensor) -> Tensor:
    grey = image.mean(0, keepdim=True)
    return grey + GREY * (image - grey)


def _draw(
    image: Tensor, mask: Tensor, what: Composition, label: int, split: str, place: Place, generator: Generator
) -> list[int]:
    """Write one object into image and mask; return the corners around its ink."""
    left, top, right, low = place
    x, y = _grid(right - left)
    inked = _digit(what.thing, split, right - left, generator) if what.texture is None else OUTLINES[what.thing](x, y)
    image[:, top:low, left:right] = torch.where(inked, _paint(what, x, y, generator), image[:, top:low, left:right])
    mask[top:low, left:right][inked] = label + 1
    rows, columns = inked.any(1).nonzero()[:, 0], inked.any(0).nonzero()[:, 0]
    return [left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1]


def _grid(side: int) -> tuple[Tensor, Tensor]:
    """Return x and y of the middles of pixels, each [side, side] within -1..1."""
    middles = (2 * torch.arange(side) + 1) / side - 1
    return middles.expand(side, side), middles[:, None].expand(side, side)


def _digit(word: str, split: str, side: int, generator: Generator) -> Tensor:
    """Return where the ink of one handwritten digit of the split is, bool [side, side]."""
    images, labels = digit_crops(split)
    written = images[labels == NUMBERS.index(word)]
    chosen = written[between(0, len(written) - 1, generator)]
    return F.interpolate(chosen[None, None], (side, side), mode="bilinear", align_corners=False)[0, 0] >= INK


def _paint(what: Composition, x: Tensor, y: Tensor, generator: Generator) -> Tensor:
    """Return the colour at x, y, 0..255 [3, side, side]: a shade of its own, a texture turned and moved by chance."""
    red, turn, moved = (torch.rand(n, generator=generator) for n in (3, 1, 2))
    colour = (torch.tensor(RGB[what.colour]) + SHADE * (2 * red - 1)).clamp(0, 255)[:, None, None]
    angle = math.pi * float(turn)
    across = PERIODS * (x * math.cos(angle) + y * math.sin(angle)) + moved[0]
    along = PERIODS * (y * math.cos(angle) - x * math.sin(angle)) + moved[1]
    return torch.where(PATTERNS[what.texture](across, along), DARK * colour, colour)
