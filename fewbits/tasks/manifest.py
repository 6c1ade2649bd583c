"""A manifest: one CSV line an image, with its label and the groups that it belongs to; and what the public layouts are.

Columns (names can be changed): ``path`` below the folder of the images, ``label``, one or several of groups, and, if it
likes, ``split`` (train, val or test). Without a split, images go 60/20/20 by (label, group) and seed 42.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewbits.errors import DataError, nearest
from fewbits.tasks.data import stratified_indices

SPLITS = ("train", "val", "test")
UNKNOWN = ("drop", "keep", "group")  # leave out; keep without a group; a group of their own
UNNAMED = {"", "unknown", "unk", "nan", "none", "-1"}
SHARES = {"test": 0.2, "val": 0.25}  # 0.25 of what is left
SEED = 42

Row = Mapping[str, str]


@dataclass(frozen=True)
class Manifest:
    """paths, labels (index into classes), groups (index into group_names, -1 unknown), splits; dropped: by reason."""

    paths: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]
    groups: Tensor
    group_names: tuple[str, ...]
    splits: tuple[str, ...]
    dropped: Mapping[str, int]

    def rows(self, split: str) -> Tensor:
        """Return the index of the examples of a split."""
        return torch.tensor([i for i, s in enumerate(self.splits) if s == split], dtype=torch.int64)


def read_manifest(
    file: Path,
    *,
    group: str | Sequence[str] = "group",
    label: str = "label",
    path: str = "path",
    split: str = "split",
    classes: Sequence[str] | None = None,
    unknown: str = "drop",
) -> Manifest:
    """Read a manifest. group: a column, or several, whose combinations are then the groups ("female x old").

    classes: in index order; None: the sorted labels of the whole file. unknown: images of no known group are dropped
    and counted, kept for training and overall numbers, or a group "unknown". Raises DataError for a file that cannot be
    read, a column that is missing (all are listed), an empty label, or a label that is not among classes.
    """
    rows, columns = read_csv(file)
    group = (group,) if isinstance(group, str) else tuple(group)
    for column in (path, label, *group):
        if column not in columns:
            raise DataError(f"{file} has no column {column!r}{nearest(column, columns)}; its columns are {columns}")
    return build_manifest(
        rows,
        path=lambda row: row[path],
        label=lambda row: row[label],
        group=lambda row: [row[column] for column in group],
        split=(lambda row: row[split]) if split in columns else None,
        classes=classes,
        unknown=unknown,
        where=str(file),
    )


def build_manifest(
    rows: Iterable[Row],
    *,
    path: Callable[[Row], str],
    label: Callable[[Row], str],
    group: Callable[[Row], Sequence[str]],
    split: Callable[[Row], str] | None = None,
    stratum: Callable[[Row], str] | None = None,
    classes: Sequence[str] | None = None,
    unknown: str = "drop",
    where: str = "the manifest",
) -> Manifest:
    """Build a manifest from rows, by functions that say what is what.

    stratum: of rows that must not be parted by a split (photos of one lesion). The rest: as of ``read_manifest``.
    """
    if unknown not in UNKNOWN:
        raise DataError(f"unknown groups can be one of {UNKNOWN}, got {unknown!r}")
    kept, dropped = [], 0
    for number, row in enumerate(rows, start=2):  # line 1 is the header
        parts = [part.strip() for part in group(row)]
        missing = any(part.lower() in UNNAMED for part in parts)
        if missing and unknown == "drop":
            dropped += 1
            continue
        name = None if missing and unknown == "keep" else "unknown" if missing else " x ".join(parts)
        if not label(row).strip() or not path(row).strip():
            raise DataError(f"{where}, line {number}: path and label must not be empty, got {dict(row)}")
        kept.append((path(row).strip(), label(row).strip(), name, row))
    if not kept:
        raise DataError(f"{where} has no image of a known group ({dropped} were dropped): look at its group column")
    known = tuple(classes) if classes is not None else tuple(sorted({entry[1] for entry in kept}))
    for entry in kept:
        if entry[1] not in known:
            raise DataError(f"{where}: {entry[0]} has the label {entry[1]!r}{nearest(entry[1], known)}; known: {known}")
    names = tuple(sorted({entry[2] for entry in kept if entry[2] is not None}))
    labels = torch.tensor([known.index(entry[1]) for entry in kept])
    groups = torch.tensor([-1 if entry[2] is None else names.index(entry[2]) for entry in kept])
    if split is not None:
        splits = tuple(_split_name(split(entry[3]), entry[0], where) for entry in kept)
    else:
        splits = make_splits(labels, groups, None if stratum is None else [stratum(entry[3]) for entry in kept])
    counts = {"unknown group": dropped} if dropped else {}
    return Manifest(tuple(entry[0] for entry in kept), labels, known, groups, names, splits, counts)


def make_splits(
    labels: Tensor, groups: Tensor, together: Sequence[str] | None = None, seed: int = SEED
) -> tuple[str, ...]:
    """Return train, val or test for each example: 60/20/20, each (label, group) at its share.

    together: examples of one name stay in one split, that of the first of them. Strata of fewer than five examples go
    to train, with a warning.
    """
    first = list(range(len(labels)))
    if together is not None:
        seen: dict[str, int] = {}
        first = [seen.setdefault(name or f"#{i}", i) for i, name in enumerate(together)]
    heads = sorted(set(first))
    strata = (labels * (int(groups.max()) + 2) + groups + 1)[heads]
    _, place, sizes = torch.unique(strata, return_inverse=True, return_counts=True)
    small = sizes[place] < 5
    if bool(small.any()):
        warnings.warn(f"{int(small.sum())} images of (label, group) pairs with fewer than 5 go to train", stacklevel=2)
    split = ["train"] * len(labels)
    left = (~small).nonzero().flatten()
    for name, share in SHARES.items():
        if round(share * len(left)) < 1:
            continue
        chosen = stratified_indices(place[left], round(share * len(left)), seed)
        for i in left[chosen].tolist():
            split[heads[i]] = name
        rest = torch.ones(len(left), dtype=torch.bool)
        rest[chosen] = False
        left = left[rest]
    return tuple(split[i] for i in first)


def read_csv(file: Path) -> tuple[list[Row], list[str]]:
    """Return rows and columns of a CSV file. Raises DataError."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            reader = csv.DictReader(text)
            rows: list[Row] = [{str(k): str(v or "") for k, v in row.items() if k} for row in reader]
            return rows, [name for name in reader.fieldnames or [] if name]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the manifest {str(file)!r}: {error}; expected UTF-8 CSV with a header") from error


def fitzpatrick17k(file: Path, *, group: str = "binary", unknown: str = "drop") -> Manifest:
    """Read ``fitzpatrick17k.csv``: label of 114 diseases, image ``<md5hash>.jpg``, groups by skin type.

    group: "binary" (light: types 1 to 3, dark: 4 to 6) or "type". Images are not fetched.
    """
    if group not in ("binary", "type"):
        raise DataError(f"group must be 'binary' or 'type', got {group!r}")
    rows, columns = read_csv(file)
    require_columns(file, columns, ("md5hash", "fitzpatrick_scale", "label"))

    def tone(row: Row) -> list[str]:
        scale = row["fitzpatrick_scale"].strip().removesuffix(".0")
        if scale not in ("1", "2", "3", "4", "5", "6"):
            return ["unknown"]
        return [f"type {scale}" if group == "type" else "light" if int(scale) <= 3 else "dark"]

    return build_manifest(
        rows, path=lambda row: f"{row['md5hash']}.jpg", label=lambda row: row["label"], group=tone, unknown=unknown,
        where=str(file),
    )  # fmt: skip


def isic2019(truth: Path, metadata: Path, *, unknown: str = "drop") -> Manifest:
    """Read ISIC 2019's tables: label by the column with a 1, image ``<image>.jpg``, groups by sex.

    Images of one lesion stay in one split.
    """
    rows, columns = read_csv(truth)
    about, more = read_csv(metadata)
    require_columns(truth, columns, ("image",))
    require_columns(metadata, more, ("image", "sex", "lesion_id"))
    details = {row["image"]: row for row in about}
    classes = [name for name in columns if name != "image"]

    def label(row: Row) -> str:
        return next((name for name in classes if float(row[name] or 0) == 1), "")

    used = [name for name in classes if any(label(row) == name for row in rows)]
    return build_manifest(
        rows,
        path=lambda row: f"{row['image']}.jpg",
        label=label,
        group=lambda row: [details.get(row["image"], {}).get("sex", "")],
        stratum=lambda row: details.get(row["image"], {}).get("lesion_id", ""),
        classes=used,
        unknown=unknown,
        where=str(truth),
    )


def require_columns(file: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    """Raise DataError, listing the columns that are there, where one is missing."""
    for column in needed:
        if column not in columns:
            raise DataError(
                f"{file} has no column {column!r}{nearest(column, columns)}; its columns are {list(columns)}"
            )


def _split_name(text: str, path: str, where: str) -> str:
    name = text.strip().lower()
    if name not in SPLITS:
        raise DataError(f"{where}: {path} has the split {text!r}; expected one of {SPLITS}")
    return name
