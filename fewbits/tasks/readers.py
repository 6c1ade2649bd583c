"""Readers of image archives: zip of class folders, CIFAR-10 binary batches, PNG mosaics with a CSV."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fewbits.errors import DataError

CIFAR_RECORD = 1 + 3 * 32 * 32


def decode(source: str | Path | IO[bytes], name: str, mode: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decode one image file to uint8 [H, W, C]; mode: "RGB" or "L". Raises DataError naming the file."""
    from PIL import Image

    try:
        with Image.open(source) as image:
            pixels = np.array(image.convert(mode), dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot decode the image {name!r}: {error}; remove or repair it") from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def read_zip(path: Path, label_of: Callable[[str], int], mode: str) -> tuple[Tensor, Tensor]:
    """Read ``<class folder>/<image>`` from a zip, sorted by name: uint8 [N, C, H, W] and int64 [N].

    label_of: from the name of a class folder to its label. Raises DataError for a file that is no zip, holds
    no images, holds one that does not decode, or holds images of different sizes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if not n.endswith("/"))
            images = [decode(io.BytesIO(archive.read(n)), f"{path}/{n}", mode) for n in names]
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read the zip {str(path)!r}: {error}") from error
    if not names:
        raise DataError(f"the zip {str(path)!r} is empty; expected <class>/<image> files")
    for name, image in zip(names, images):
        if image.shape != images[0].shape:
            raise DataError(f"{path}/{name} is {image.shape}, but {names[0]} is {images[0].shape}; use one size")
    labels = torch.tensor([label_of(Path(name).parent.name) for name in names], dtype=torch.int64)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels


def read_cifar_binary(files: list[Path]) -> tuple[Tensor, Tensor]:
    """Read CIFAR-10's binary version (one label byte, then 3x32x32 pixel bytes, a record)."""
    records = []
    for file in files:
        try:
            data = np.fromfile(file, dtype=np.uint8)
        except OSError as error:
            raise DataError(f"cannot read {str(file)!r}: {error}; unpack CIFAR-10 again") from error
        if data.size == 0 or data.size % CIFAR_RECORD:
            raise DataError(f"{str(file)!r} has {data.size} bytes, no multiple of {CIFAR_RECORD}; copy it again")
        records.append(data.reshape(-1, CIFAR_RECORD))
    stacked = torch.from_numpy(np.concatenate(records))
    return stacked[:, 1:].reshape(-1, 3, 32, 32), stacked[:, 0].to(torch.int64)


def read_mosaics(folder: Path) -> tuple[Tensor, Tensor]:
    """Read ``cifar10_batch_<k>.png`` (one 32x32 RGB image a row) with ``labels_batch_<k>.csv`` (row, label).

    Raises DataError for a folder without them, and where rows and labels do not match.
    """
    mosaics = sorted(folder.glob("cifar10_batch_*.png"))
    if not mosaics:
        raise DataError(f"{str(folder)!r} holds no cifar10_batch_<k>.png; give the folder of the lossless CIFAR-10")
    images, labels = zip(*(_read_mosaic(mosaic) for mosaic in mosaics))
    return torch.cat(images), torch.cat(labels)


def _read_mosaic(mosaic: Path) -> tuple[Tensor, Tensor]:
    pixels = decode(mosaic, str(mosaic), "RGB")
    if pixels.shape[1] != 32 * 32:
        raise DataError(f"{str(mosaic)!r} is {pixels.shape[1]} pixels wide, expected {32 * 32}: one image a row")
    images = torch.from_numpy(pixels.reshape(-1, 32, 32, 3)).permute(0, 3, 1, 2).contiguous()
    table = mosaic.with_name(mosaic.stem.replace("cifar10_batch", "labels_batch") + ".csv")
    try:
        with table.open(newline="", encoding="utf-8") as lines:
            label_of_row = {int(line["row"]): int(line["label"]) for line in csv.DictReader(lines)}
        labels = torch.tensor([label_of_row[row] for row in range(len(images))], dtype=torch.int64)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{str(table)!r} lacks an integer row,label for each image: {error!r}") from error
    return images, labels
