"""Sizes of the open-vocabulary detector: those of YOLO-World, and one that trains on a processor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewbits.errors import RecipeError, nearest
from fewbits.tasks.open_vocabulary.regions import SIDE_BINS


@dataclass(frozen=True)
class Size:
    """widths: channels of the backbone at strides 2, 4, 8, 16, 32; half of each of the last three is a multiple of
    head_width. depths: bottlenecks of the backbone's blocks at strides 4, 8, 16, 32. neck: bottlenecks of a block of
    the neck. head_width: channels a head of attention. enhancer: width of image-pooling attention. box, classes: widths
    of the branches of a head.
    """

    widths: tuple[int, int, int, int, int]
    depths: tuple[int, int, int, int]
    neck: int
    head_width: int
    enhancer: int
    box: int
    classes: int


def yolo_world(depth: float, width: float, last: int) -> Size:
    """Return a size of YOLO-World v1 by the multipliers of its family; last: channels at stride 32 before them."""

    def scaled(channels: int) -> int:
        return 8 * math.ceil(channels * width / 8)

    def repeats(count: int) -> int:
        return max(1, round(count * depth))

    widths = (scaled(64), scaled(128), scaled(256), scaled(512), scaled(last))
    depths = (repeats(3), repeats(6), repeats(6), repeats(3))
    box, classes = max(16, widths[2] // 4, 4 * SIDE_BINS), max(widths[2], 80)
    return Size(widths, depths, repeats(3), 32, 256, box, classes)


SIZES = {
    "nano": Size((16, 24, 48, 96, 128), (1, 1, 1, 1), 1, 8, 64, 32, 48),
    "s": yolo_world(0.33, 0.5, 1024),
    "m": yolo_world(0.67, 0.75, 768),
    "l": yolo_world(1.0, 1.0, 512),
    "x": yolo_world(1.0, 1.25, 512),
}


def size_of(name: str) -> Size:
    """Return a size by its name. Raises RecipeError for an unknown one."""
    if name not in SIZES:
        raise RecipeError(
            f"sizes of the open-vocabulary detector are {list(SIZES)}, got {name!r}{nearest(name, SIZES)}"
        )
    return SIZES[name]
