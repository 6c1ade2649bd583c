"""Small pictures for the page: images and masks as data URIs."""

from __future__ import annotations

import base64
import colorsys
import io
from typing import Any

import numpy as np

MOST_SIDE = 320  # pixels of a picture's longer side
GOLDEN = 0.61803  # steps of the hue that keep the colours of any number of classes apart
PHOTO_QUALITY = 85
SHADES = 100  # between 0 and 1, of a heat map
LOW, MIDDLE, HIGH = (33, 102, 172), (247, 247, 247), (178, 24, 43)
Pixels = np.ndarray[Any, np.dtype[Any]]


def photo(image: Pixels) -> str:
    """Return an image, uint8 [H, W, 3], as a data URI: JPEG, scaled down to MOST_SIDE."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((MOST_SIDE, MOST_SIDE))
    return _uri(picture, "jpeg", quality=PHOTO_QUALITY)


def colours(mask: Pixels, palette: list[tuple[int, int, int]]) -> str:
    """Return a mask, integers [H, W] of which each has a colour in the palette, as a data URI: an indexed PNG."""
    from PIL import Image

    picture = Image.fromarray(mask.astype(np.uint8))
    picture.putpalette([value for colour in palette for value in colour])
    side = max(picture.size)
    if side > MOST_SIDE:
        width, height = (max(1, round(s * MOST_SIDE / side)) for s in picture.size)
        picture = picture.resize((width, height), Image.Resampling.NEAREST)
    return _uri(picture, "png", optimize=True)


def heat_map(matrix: Pixels) -> str:
    """Return numbers of -1..1, [rows, columns], as a data URI: a PNG of squares in the colours of ``shade``."""
    from PIL import Image

    palette = np.array([shade(step / SHADES) for step in range(-SHADES, SHADES + 1)], dtype=np.uint8)
    steps = np.rint(np.clip(matrix, -1, 1) * SHADES).astype(np.int64) + SHADES
    picture = Image.fromarray(palette[steps])
    factor = max(1, MOST_SIDE // max(picture.size))
    picture = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
    return _uri(picture, "png", optimize=True)


def shade(value: float) -> tuple[int, int, int]:
    """Return the colour of a number of -1..1: blue, white at 0, red."""
    end = HIGH if value >= 0 else LOW
    red, green, blue = (round(m + abs(value) * (e - m)) for m, e in zip(MIDDLE, end))
    return red, green, blue


def class_colours(count: int) -> list[tuple[int, int, int]]:
    """Return a colour, three numbers of 0..255, for each class; the first is the darkest, as it is often the ground."""
    found = [(40, 44, 52)]
    for i in range(1, count):
        red, green, blue = colorsys.hsv_to_rgb(0.02 + GOLDEN * (i - 1) % 1, 0.85 - 0.3 * (i % 3 == 0), 0.95)
        found.append((round(255 * red), round(255 * green), round(255 * blue)))
    return found


def hex_colour(colour: tuple[int, int, int]) -> str:
    """Return a colour as a style sheet writes it: #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _uri(picture: Any, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
