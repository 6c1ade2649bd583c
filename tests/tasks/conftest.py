from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewbits.tasks.data import ImageExamples, shared_data_dir


@pytest.fixture
def tiny() -> Callable[..., ImageExamples]:
    """Build 40 random images of 3x6x5 with four classes; keyword arguments replace fields."""

    def build(**fields: object) -> ImageExamples:
        generator = torch.Generator().manual_seed(0)
        defaults = {
            "images": torch.randint(0, 256, (40, 3, 6, 5), generator=generator).to(torch.uint8),
            "labels": torch.arange(40) % 4,
            "classes": ("a", "b", "c", "d"),
            "mean": (0.5, 0.4, 0.3),
            "std": (0.2, 0.3, 0.4),
        }
        return ImageExamples(**(defaults | fields))  # type: ignore[arg-type]

    return build


@pytest.fixture
def shared() -> Path:
    folder = shared_data_dir()
    if folder is None:
        pytest.skip("no ../shared/data beside the checkout")
    return folder


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    """Encode a PNG of one grey value, or of an array."""

    def encode(value: int | np.ndarray, size: tuple[int, int] = (4, 6)) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.broadcast_to(np.uint8(value), (*size, 3)).copy()).save(buffer, "PNG")
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def write_zip() -> Callable[..., Path]:
    def write(path: Path, files: dict[str, bytes]) -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path

    return write
