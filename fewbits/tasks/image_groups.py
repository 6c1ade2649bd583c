"""Groups of images that have boxes or masks: a table that names the group of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fewbits.errors import DataError
from fewbits.tasks.manifest import UNNAMED, read_csv, require_columns

COLUMNS = ("image", "group")


def image_groups(file: Path, images: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Return the group of each image, int64 [images], -1 where it is not known, and the names of the groups.

    file: CSV with the columns ``image`` (name of a file, without its folder) and ``group``; lines of other images do
    not matter, so that one table serves all splits. Raises DataError for a file that cannot be read, a column that is
    missing, two groups of one image, and where no image of a known group is left.
    """
    rows, columns = read_csv(file)
    require_columns(file, columns, COLUMNS)
    found: dict[str, str] = {}
    for row in rows:
        image, group = row["image"].strip(), row["group"].strip()
        if found.setdefault(image, group) != group:
            raise DataError(f"{file} gives {image!r} two groups, {found[image]!r} and {group!r}; leave one")
    given = [found.get(name, "") for name in images]
    names = tuple(sorted({group for group in given if group.lower() not in UNNAMED}))
    if not names:
        raise DataError(
            f"{file} has no group of any of the {len(images)} images, such as {images[0]!r}: the column image holds "
            f"names of files without folders, here for example {next(iter(found), '')!r}"
        )
    return torch.tensor([names.index(group) if group in names else -1 for group in given]), names
