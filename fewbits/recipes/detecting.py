"""Asking a packed open-vocabulary detector for words on a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.errors import DataError
from fewbits.report.pictures import class_colours
from fewbits.tasks.detection_metrics import SEEN, Detections
from fewbits.tasks.open_vocabulary.packed import AskedDetector
from fewbits.tasks.readers import decode

PICTURE_SIDE = 640  # pixels to which a small picture grows, so that lines and words do not hide what is in it
MOST_GROWTH = 8
LEAST_TEXT, TEXT_LINES = 12, 45  # pixels of words at least, and how many lines of them an image has room for
DARK = (20, 20, 20)


def detect(
    target: Path, image: Path, text: str, out: Path, score: float = SEEN, encoder: str | None = None
) -> dict[str, Any]:
    """Look for what ``text`` names, prompts with commas between, on an image; draw it into the file ``out``.

    target: a packed file, or the folder of a run. encoder: folder of the CLIP, where it is not that of training.
    Returns prompts and what was found, best first, corners in pixels of the image. Raises PackedFileError for a file
    that holds no open-vocabulary detector, and DataError for prompts, an image or an encoder that cannot be used.
    """
    prompts = [part.strip() for part in text.split(",")]
    asked = AskedDetector.open(target / "model.safetensors" if target.is_dir() else target, encoder)
    if not image.is_file():
        raise DataError(f"the image {str(image)!r} does not exist or is no file")
    pixels = torch.from_numpy(decode(image, str(image), "RGB")).permute(2, 0, 1)
    found = asked.find(pixels, prompts, score)
    _save(pictured(pixels, found, prompts), out)
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist())
    return {
        "image": str(image),
        "prompts": prompts,
        "found": [{"prompt": prompts[label], "score": value, "box": corners} for label, value, corners in rows],
        "picture": str(out),
    }


def pictured(image: Tensor, found: Detections, prompts: Sequence[str]) -> Any:
    """Return an image, uint8 [3, H, W], with the boxes, a colour for each prompt, and words and scores at them."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    factor = min(MOST_GROWTH, max(1, PICTURE_SIDE // max(picture.size)))
    picture = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
    draw, palette = ImageDraw.Draw(picture), class_colours(len(prompts) + 1)[1:]
    font = ImageFont.load_default(max(LEAST_TEXT, max(picture.size) // TEXT_LINES))
    for row in reversed(range(len(found.labels))):  # the best comes last, on top
        label, (x1, y1, x2, y2) = int(found.labels[row]), (factor * c for c in found.boxes[row].tolist())
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=palette[label], width=2)
        words = f"{prompts[label]} {float(found.scores[row]):.2f}"
        left, top, right, low = draw.textbbox((0, 0), words, font=font)
        x, y = max(0, min(x1, picture.width - right)), max(0, y1 - low - 1)
        draw.rectangle((x + left - 1, y + top - 1, x + right + 1, y + low + 1), fill=palette[label])
        draw.text((x, y), words, fill=DARK, font=font)
    return picture


def _save(picture: Any, out: Path) -> None:
    try:
        picture.save(out)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write the picture {str(out)!r}: {error}; name a .png or .jpg file") from error
