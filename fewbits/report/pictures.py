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
