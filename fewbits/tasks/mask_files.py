"""Images with their masks in folders: which belong together, and reading them once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fewbits.errors import DataError
from fewbits.tasks.masks import MaskFormat, opened
from fewbits.tasks.readers import decode

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
KEPT_BYTES = 1 << 30  # of decoded images; beyond it they are read again each time
Pair = tuple[Tensor, Tensor]
Paths = tuple[Path, Path]


class PairReader:
    """Reads an image with its mask, and keeps what it has read as long as that fits into ``KEPT_BYTES``."""

    def __init__(self, format: MaskFormat) -> None:
        self.format = format
        self._kept: dict[Paths, Pair] = {}
        self._bytes = 0

    def read(self, paths: Paths) -> Pair:
        """Return image uint8 [3, H, W] and mask uint8 [H, W]. Raises DataError, naming the file that is unfit."""
        found = self._kept.get(paths)
        if found is None:
            image = torch.from_numpy(decode(paths[0], str(paths[0]), "RGB")).permute(2, 0, 1).contiguous()
            found = image, self.format.read(paths[1])
            if self._bytes < KEPT_BYTES:
                self._kept[paths] = found
                self._bytes += image.numel() + found[1].numel()
        return found

    def fill(self, pairs: Iterable[Paths]) -> None:
        """Read what can be kept, so that a file that is unfit is found before anything is trained."""
        for paths in pairs:
            if self._bytes < KEPT_BYTES:
                self.read(paths)


def pair_files(root: Path, images: str, masks: str, names: Path | None = None) -> list[tuple[Path, Path]]:
    """Return the images with their masks, sorted by name, and check that they are there and of one size.

    images: folder under root. masks: path under root with ``{stem}`` for the image's name. names: a file that lists
    those to take, one name a line, with or without suffix; None: all. Raises DataError for a list or a folder without
    images, an image or a mask that is missing or not an image, and for a mask of another size than its image.
    """
    folder = root / images
    found = {p.stem: p for p in sorted(folder.glob("*")) if p.suffix.lower() in SUFFIXES}
    if not found:
        raise DataError(f"there is no image in {str(folder)!r} ({', '.join(SUFFIXES)}); correct path= or images=")
    stems = list(found) if names is None else _listed(names, found, folder)
    pairs = [(found[stem], root / masks.replace("{stem}", stem)) for stem in stems]
    missing = [(image, mask) for image, mask in pairs if not mask.is_file()]
    if missing:
        image, mask = missing[0]
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"the mask {str(mask)!r} of {image.name!r} is missing{more}; add it, or correct masks=")
    for image, mask in pairs:
        _same_size(image, mask)
    return pairs


def _listed(names: Path, found: Mapping[str, Path], folder: Path) -> list[str]:
    try:
        listed = [line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the list of images {str(names)!r}: {error}; correct names=") from error
    stems = [Path(name).stem if Path(name).suffix.lower() in SUFFIXES else Path(name).name for name in listed]
    for name, stem in zip(listed, stems):
        if stem not in found:
            raise DataError(f"{str(names)!r} lists {name!r}, which is not in {str(folder)!r}; add it or drop the line")
    if not stems:
        raise DataError(f"the list {str(names)!r} names no image; give one name a line")
    return stems


def _same_size(image: Path, mask: Path) -> None:
    with opened(image) as first, opened(mask) as second:
        if first.size != second.size:
            raise DataError(
                f"the mask {str(mask)!r} is {second.size[0]}x{second.size[1]} pixels, its image {image.name!r} "
                f"{first.size[0]}x{first.size[1]}; they must be of one size"
            )
