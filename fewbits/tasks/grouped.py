"""Classification data with groups: real images with sex, age or view, and images whose minority is hard to read."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import DataError
from fewbits.tasks.data import ImageExamples, stratified_indices
from fewbits.tasks.manifest import Manifest, Row, build_manifest, read_csv, read_manifest
from fewbits.tasks.readers import decode

HARMS = ("contrast", "blur", "dark")
GROUPS = ("majority", "minority")
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which pretrained models expect
OLD = 60  # years, from which on an age counts as old


def with_minority(
    examples: ImageExamples, harm: str = "contrast", strength: float = 0.7, share: float = 0.1, seed: int = 0
) -> ImageExamples:
    """Return the examples with ``share`` of each class as a minority whose images are harder to read.

    harm: "contrast" (drawn towards each image's mean), "blur" (mixed with the mean of 3x3 pixels, twice) or "dark", by
    ``strength``, 0 (as they were) to 1 (nothing is left). Raises DataError for a value out of range.
    """
    if harm not in HARMS or not 0 <= strength <= 1 or not 0 < share < 1:
        raise DataError(
            f"a minority needs a harm of {HARMS}, 0 <= strength <= 1 and 0 < share < 1, got {harm!r}, {strength} and "
            f"{share}"
        )
    rows = stratified_indices(examples.labels, max(1, round(share * len(examples))), seed)
    groups = torch.zeros(len(examples), dtype=torch.int64)
    groups[rows] = 1
    images = examples.images.clone()
    images[rows] = _harmed(images[rows].float(), harm, strength).round().clamp(0, 255).to(torch.uint8)
    return dataclasses.replace(examples, images=images, groups=groups, group_names=GROUPS)


def _harmed(images: Tensor, harm: str, strength: float) -> Tensor:
    if harm == "dark":
        return images * (1 - strength)
    if harm == "contrast":
        return torch.lerp(images, images.mean((1, 2, 3), keepdim=True), strength)
    blurred = images
    for _ in range(2):
        blurred = F.avg_pool2d(F.pad(blurred, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return torch.lerp(images, blurred, strength)


def isic2017(folder: Path, split: str, group: Sequence[str], size: int, unknown: str) -> ImageExamples:
    """Skin lesions of ISIC 2017 (CC0): nevus, melanoma or seborrheic keratosis; groups "sex" and "age"."""
    table, archive = _pair(folder)

    def label(row: Row) -> str:
        return "melanoma" if row["melanoma"] == "1" else "keratosis" if row["seborrheic_keratosis"] == "1" else "nevus"

    manifest = _described(
        table, group, unknown, path=lambda row: f"{row['image_id']}.jpg", label=label,
        columns={"sex": lambda row: row["sex"], "age": lambda row: _age(row["age_approximate"])},
    )  # fmt: skip
    return from_zip(manifest, archive, split, size, "RGB")


def nih_cxr64(folder: Path, split: str, group: Sequence[str], size: int, unknown: str) -> ImageExamples:
    """Chest x-rays of the NIH Clinical Center, normal or abnormal; groups "sex", "age" and "view".

    All images of a patient are in one split.
    """
    table, archive = _pair(folder)
    manifest = _described(
        table, group, unknown, path=lambda row: row["image"],
        label=lambda row: "abnormal" if row["abnormal"] == "1" else "normal",
        columns={
            "sex": lambda row: {"F": "female", "M": "male"}.get(row["sex"], ""),
            "age": lambda row: _age(row["age"]),
            "view": lambda row: row["view"],
        },
        together=lambda row: row["patient_id"],
    )  # fmt: skip
    return from_zip(manifest, archive, split, size, "L")


def manifest_images(
    folder: Path,
    split: str,
    group: Sequence[str],
    size: int,
    unknown: str,
    file: str,
    label: str,
    classes: Sequence[str] | None,
) -> ImageExamples:
    """Images below a folder, as a manifest in it says; see ``read_manifest``."""
    manifest = read_manifest(folder / file, group=group, label=label, classes=classes, unknown=unknown)

    def read(name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        path = folder / name
        if not path.is_file():
            raise DataError(f"{folder / file} names {name!r}, and there is no such image below {str(folder)!r}")
        return decode(path, str(path), "RGB")

    return _examples(manifest, split, size, read)


def from_zip(manifest: Manifest, archive: Path, split: str, size: int, mode: str) -> ImageExamples:
    """Read the images of one split from a zip, resized to size x size. Raises DataError for one that is missing."""
    try:
        with zipfile.ZipFile(archive) as file:
            names = set(file.namelist())

            def read(name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
                if name not in names:
                    raise DataError(f"{archive} has no image {name!r}, which its table names")
                return decode(io.BytesIO(file.read(name)), f"{archive}/{name}", mode)

            return _examples(manifest, split, size, read)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read the zip {str(archive)!r}: {error}") from error


def _examples(manifest: Manifest, split: str, size: int, read: Any) -> ImageExamples:
    rows = torch.cat([manifest.rows(s) for s in (("train", "val") if split == "train" else ("test",))])
    if not len(rows):
        raise DataError(f"the manifest has no image in the split {split!r}")
    images = torch.stack([_resized(read(manifest.paths[i]), size) for i in rows.tolist()])
    return ImageExamples(
        images=images,
        labels=manifest.labels[rows],
        classes=manifest.classes,
        groups=manifest.groups[rows],
        group_names=manifest.group_names,
        mean=MEAN if images.shape[1] == 3 else (0.5,),
        std=SPREAD if images.shape[1] == 3 else (0.25,),
        flip=split == "train",
        crop_padding=size // 16 if split == "train" else 0,
    )


def _resized(pixels: np.ndarray[Any, np.dtype[np.uint8]], size: int) -> Tensor:
    """Return uint8 [C, size, size]."""
    from PIL import Image

    if pixels.shape[:2] != (size, size):
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).reshape(size, size, -1)
    return torch.from_numpy(pixels.copy()).movedim(2, 0)


def _described(
    table: Path,
    group: Sequence[str],
    unknown: str,
    *,
    path: Any,
    label: Any,
    columns: dict[str, Any],
    together: Any = None,
) -> Manifest:
    for name in group:
        if name not in columns:
            raise DataError(f"{table.name} has the groups {sorted(columns)}, got {name!r}")
    rows, _ = read_csv(table)
    return build_manifest(
        rows, path=path, label=label, group=lambda row: [columns[name](row) for name in group], stratum=together,
        unknown=unknown, where=str(table),
    )  # fmt: skip


def _age(text: str) -> str:
    try:
        years = float(text)
    except ValueError:
        return "unknown"
    return f"{OLD} and over" if years >= OLD else f"under {OLD}"


def _pair(folder: Path) -> tuple[Path, Path]:
    """Return the table and the zip beside it."""
    tables, archives = sorted(folder.glob("*.csv")), sorted(folder.glob("*.zip"))
    if len(tables) != 1 or len(archives) != 1:
        found = [p.name for p in (*tables, *archives)]
        raise DataError(f"expected one CSV table and one zip of images in {str(folder)!r}, found {found}")
    return tables[0], archives[0]
