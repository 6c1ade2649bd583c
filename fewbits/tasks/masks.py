"""Masks in files: what their pixels mean."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.errors import DataError

IGNORE = 255  # in a mask: this pixel has no class, and counts nowhere
MOST_CLASSES = 255
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class MaskFormat:
    """What the pixels of a mask file mean.

    classes: how many. instances: 0 is class 0, and any other number an object of class 1. palette: index by colour, of
    masks in colours; None: a pixel is its class. ignore: the value (without a palette) of pixels without a class.
    Raises DataError where that is no count of classes that a mask may have.
    """

    classes: int
    instances: bool = False
    palette: Mapping[Colour, int] | None = None
    ignore: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= MOST_CLASSES:
            raise DataError(f"segmentation takes 2 to {MOST_CLASSES} classes, got {self.classes}")
        if self.instances and (self.classes != 2 or self.palette):
            raise DataError(f"masks of instances have two classes and no palette, got {self.classes} classes")

    def read(self, path: Path) -> Tensor:
        """Return uint8 [H, W] with classes and IGNORE. Raises DataError, naming the file, for anything else in it."""
        with opened(path) as image:
            pixels = np.array(image.convert("RGB") if self.palette is not None else image)
        if pixels.ndim != (2 if self.palette is None else 3):
            raise DataError(
                f"the mask {str(path)!r} is in colours (mode {image.mode}); expected one number a pixel, or name the "
                "file of its colours with palette="
            )
        if self.palette is not None:
            return torch.from_numpy(_by_colour(pixels, self.palette, path))
        if self.instances:
            return torch.from_numpy((pixels > 0).astype(np.uint8))
        return torch.from_numpy(self._indices(pixels, path))

    def _indices(self, pixels: Any, path: Path) -> Any:
        ignored = np.zeros(pixels.shape, bool) if self.ignore is None else pixels == self.ignore
        wrong = np.argwhere(~ignored & ((pixels < 0) | (pixels >= self.classes)))
        if len(wrong):
            row, column = (int(v) for v in wrong[0])
            also = "" if self.ignore is None else f" and {self.ignore} for none"
            raise DataError(
                f"the mask {str(path)!r} has the label {int(pixels[row, column])} in row {row}, column {column}; "
                f"there are {self.classes} classes, 0..{self.classes - 1}{also}: correct the mask, list its class, or "
                "name the value to leave out with ignore="
            )
        return np.where(ignored, IGNORE, pixels).astype(np.uint8)


def read_palette(path: Path, ignore: str | None = None) -> tuple[dict[Colour, int], tuple[str, ...]]:
    """Read a palette, a line ``R G B NAME`` for each class; return index by colour, and the names.

    ignore: the name of those pixels that have no class. Raises DataError for a line that says something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the palette {str(path)!r}: {error}; correct palette=") from error
    colours, names = dict[Colour, int](), list[str]()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        parts = line.replace(",", " ").split(maxsplit=3)
        if len(parts) != 4 or not all(p.isdecimal() and int(p) < 256 for p in parts[:3]):
            raise DataError(f"{path}, line {number}: expected 'R G B NAME' with numbers of 0..255, got {line!r}")
        colour = int(parts[0]), int(parts[1]), int(parts[2])
        if colour in colours:
            raise DataError(f"{path}, line {number}: the colour {colour} is there twice; give each class its own")
        colours[colour] = IGNORE if parts[3] == ignore else len(names)
        names += [] if parts[3] == ignore else [parts[3]]
    if ignore is not None and IGNORE not in colours.values():
        raise DataError(f"{path} has no class {ignore!r} to ignore; known: {names}")
    return colours, tuple(names)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open an image; whatever goes wrong while it is read is told as a DataError that names the file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot decode the image {str(path)!r}: {error}; remove or repair it") from error


def _by_colour(pixels: Any, palette: Mapping[Colour, int], path: Path) -> Any:
    """Turn colours [H, W, 3] into indices uint8 [H, W]."""
    keys = sorted(palette)
    wide = pixels.astype(np.int64)
    codes = (wide[..., 0] << 16) + (wide[..., 1] << 8) + wide[..., 2]
    known = np.array([(r << 16) + (g << 8) + b for r, g, b in keys])
    place = np.searchsorted(known, codes).clip(max=len(known) - 1)
    wrong = np.argwhere(known[place] != codes)
    if len(wrong):
        row, column = (int(v) for v in wrong[0])
        raise DataError(
            f"the mask {str(path)!r} has the colour {tuple(int(v) for v in pixels[row, column])} in row {row}, column "
            f"{column}, which is not in the palette; add its line, or save the mask without loss"
        )
    return np.array([palette[key] for key in keys], np.uint8)[place]
