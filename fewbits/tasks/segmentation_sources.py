"""Sources of images with masks, by name: embedded scenes, folders of your own, CamVid, and nuclei of DSB 2018."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import DataError, RecipeError, nearest
from fewbits.tasks.data import is_number, require_names
from fewbits.tasks.mask_files import PairReader, Paths, pair_files
from fewbits.tasks.masks import MaskFormat, read_palette
from fewbits.tasks.scenes import DIGITS, Scene, make_scenes
from fewbits.tasks.segmented import Read, SegmentedImages
from fewbits.tasks.sources import data_folder

CAMVID = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
)
SCENES = ("ground", *(f"digit {digit}" for digit in DIGITS))
FIELDS = [f.name for f in dataclasses.fields(SegmentedImages) if f.name not in ("reads", "classes", "names")]
Counts = Mapping[str, int | None]
Reads = dict[str, list[Read]]
Names = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class MaskFolders:
    """Where a folder has what; the strings may hold ``{split}``.

    images: folder of the images. masks: path of a mask, with ``{stem}`` for its image's name. names: file with
    the images to take, one a line; None: all. train, test: names of the splits. test_share: where there are no
    splits, so much is for testing, chosen at random. classes: their names in the order of the labels (without a
    palette). palette: file of colours, a line ``R G B NAME`` for each class, if masks are in colours. instances: masks
    count objects, of one class, ``classes[1]``. ignore: label (with a palette: the name) of pixels without a class.
    Raises DataError where these do not go together.
    """

    images: str = "images/{split}"
    masks: str = "masks/{split}/{stem}.png"
    names: str | None = None
    train: str = "train"
    test: str = "test"
    test_share: float | None = None
    classes: tuple[str, ...] | None = None
    palette: str | None = None
    instances: bool = False
    ignore: int | str | None = None

    def __post_init__(self) -> None:
        if (self.classes is None) == (self.palette is None):
            raise DataError("name the classes of the masks, classes=[...], or the file of their colours, palette=")
        if self.ignore is not None and type(self.ignore) is not (int if self.palette is None else str):
            raise DataError(f"ignore is a label, or with a palette the name of a colour, got {self.ignore!r}")
        for name in ("images", "masks", "names", "train", "test", "palette"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name not in ("names", "palette")):
                raise DataError(f"{name} is a name or a path, got {value!r}")
        if self.classes is not None:
            require_names(self.classes)
        if type(self.instances) is not bool:
            raise DataError(f"instances is true or false, got {self.instances!r}")
        if self.test_share is not None and not (is_number(self.test_share) and 0 < self.test_share < 1):
            raise DataError(f"test_share is the part of the images for testing, within 0..1, got {self.test_share!r}")

    def load(self, root: Path, counts: Counts, seed: int) -> tuple[Reads, Names, tuple[str, ...]]:
        """Return what reads the examples of "train" and "test", the images' names, and the classes.

        Raises DataError for unfit files.
        """
        form, classes = self._format(root)
        reader, pairs = PairReader(form), self._pairs(root)
        chosen = {split: _few(found, counts.get(split), seed) for split, found in pairs.items()}
        reader.fill(paths for found in chosen.values() for paths in found)
        reads: Reads = {s: [functools.partial(reader.read, paths) for paths in found] for s, found in chosen.items()}
        names = {split: tuple(image.name for image, _ in found) for split, found in chosen.items()}
        return reads, names, classes

    def _format(self, root: Path) -> tuple[MaskFormat, tuple[str, ...]]:
        if self.palette is None:
            names, ignore = self.classes or (), self.ignore if isinstance(self.ignore, int) else None
            return MaskFormat(len(names), self.instances, ignore=ignore), names
        colours, names = read_palette(root / self.palette, self.ignore if isinstance(self.ignore, str) else None)
        return MaskFormat(len(names), self.instances, colours), names

    def _pairs(self, root: Path) -> dict[str, list[Paths]]:
        if self.test_share is None:
            return {key: self._of_split(root, name) for key, name in (("train", self.train), ("test", self.test))}
        found = self._of_split(root, "")
        count = round(self.test_share * len(found))
        if not 1 <= count < len(found):
            raise DataError(f"test_share={self.test_share} of {len(found)} images leaves one side empty")
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
        parts = {"train": order[count:], "test": order[:count]}
        return {split: [found[i] for i in sorted(chosen)] for split, chosen in parts.items()}

    def _of_split(self, root: Path, split: str) -> list[Paths]:
        # not str.format: {stem} is left for each image
        images, masks, names = (s and s.replace("{split}", split) for s in (self.images, self.masks, self.names))
        return pair_files(root, images or "", masks or "", None if names is None else root / names)


# what a source means by itself; a recipe's options win
DEFAULTS: dict[str, dict[str, Any]] = {
    "scenes": {"train": 800, "test": 200, "side": 96, "ground": 0, "flip": "none", "min_area": 0.5},
    "masks": {},
    "camvid": {
        "images": "{split}",
        "masks": "{split}annot/{stem}.png",
        "classes": CAMVID,
        "ignore": 11,
        "size": (360, 480),
    },
    "nuclei": {
        "images": "images",
        "masks": "instance_masks/{stem}.png",
        "test_share": 0.25,
        "classes": ("ground", "nucleus"),
        "instances": True,
        "size": (256, 256),
        "ground": 0,
        "flip": "both",
    },
}
SHARED = {"camvid": "camvid", "nuclei": "nuclei_dsb2018"}


def load_segmentation(
    name: str,
    path: Path | None = None,
    options: Mapping[str, Any] | None = None,
    counts: Counts | None = None,
    seed: int = 0,
) -> tuple[SegmentedImages, SegmentedImages]:
    """Load a source; return its training examples and its test examples.

    name: scenes, masks, camvid or nuclei. path: its folder; None where it is embedded or shared. options: those of
    ``DEFAULTS``, the fields of ``MaskFolders`` (of ``scenes``: how many to ``train`` and ``test`` with, and their
    ``side`` in pixels), and those of ``SegmentedImages``; size: None for that of the first image. counts: how many
    "train" and "test" examples to use, chosen by ``seed``. Raises RecipeError for an unknown name or option, DataError
    for unusable data.
    """
    if name not in DEFAULTS:
        raise RecipeError(
            f"unknown source {name!r} of segmentation{nearest(name, DEFAULTS)}; known: {sorted(DEFAULTS)}"
        )
    own = ["train", "test", "side"] if name == "scenes" else [f.name for f in dataclasses.fields(MaskFolders)]
    for option in options or {}:
        if option not in (*own, *FIELDS):
            raise RecipeError(f"{name!r} has no option {option!r}{nearest(option, [*own, *FIELDS])}; known: "
                              f"{[*own, *FIELDS]}")  # fmt: skip
    given = {key: _frozen(value) for key, value in {**DEFAULTS[name], **(options or {})}.items()}
    where = {key: given.pop(key) for key in own if key in given}
    if name == "scenes":
        reads, classes = scenes(path, counts or {}, seed, **where), SCENES
        names = {split: tuple(f"scene {i}" for i in range(len(found))) for split, found in reads.items()}
    else:
        folder = data_folder(path, SHARED[name]) if name in SHARED else _given(path)
        reads, names, classes = MaskFolders(**where).load(folder, counts or {}, seed)
    if given.get("size") is None:
        height, width = reads["train"][0]()[1].shape
        given["size"] = (height, width)
    train, test = (
        SegmentedImages(reads=reads[split], classes=classes, names=names[split], **given) for split in ("train", "test")
    )
    return train, test


def scenes(path: Path | None, counts: Counts, seed: int, *, train: int, test: int, side: int) -> Reads:
    """Make scenes; see ``load_segmentation``."""
    if path is not None:
        raise DataError(f"'scenes' are made and read no files, got path={str(path)!r}; leave it out")
    many = {"train": counts.get("train") or train, "test": counts.get("test") or test}
    made = {split: make_scenes(split, count, size=side, seed=seed) for split, count in many.items()}
    return {split: [functools.partial(_read_scene, scene) for scene in found] for split, found in made.items()}


def _read_scene(scene: Scene) -> tuple[Tensor, Tensor]:
    return scene.image, scene.mask.to(torch.uint8)


def _given(path: Path | None) -> Path:
    if path is None:
        raise DataError("'masks' needs path=, the folder of the images and masks")
    return data_folder(path, "")


def _few(pairs: list[Paths], count: int | None, seed: int) -> list[Paths]:
    """Choose by chance, before anything is decoded; in the old order."""
    if count is None or count >= len(pairs):
        return pairs
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    return [pairs[i] for i in order[:count].sort().values.tolist()]


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
