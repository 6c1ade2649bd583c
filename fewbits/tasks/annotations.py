"""Readers of boxes: COCO's JSON, and folders of Pascal VOC's XML."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor

from fewbits.errors import DataError, nearest
from fewbits.tasks.detection import DetectionExamples, Objects
from fewbits.tasks.readers import decode

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
SLACK = 1.0  # pixels beyond the border that are rounding; they are cut off
CURE = "correct it, or leave such boxes and images out with skip_bad"


@dataclass(frozen=True)
class Box:
    """One object of a file: class, corners x1, y1, x2, y2 in pixels, whether it is a crowd, its area if it is told."""

    name: str
    corners: tuple[float, ...]
    crowd: bool = False
    area: float | None = None


@dataclass(frozen=True)
class Annotated:
    """One image file and its objects. source: the file that tells of them, for errors."""

    image: Path
    boxes: tuple[Box, ...]
    source: str


@dataclass
class Skipped:
    """What bad data does: raise, or, with ``allowed``, be left out and noted."""

    allowed: bool = False
    notes: list[str] = field(default_factory=list)

    def meet(self, error: str) -> None:
        """Take note of something bad. Raises DataError where it may not be skipped."""
        if not self.allowed:
            raise DataError(f"{error}; {CURE}")
        self.notes.append(error)


def read_voc(folder: Path, names: Path) -> list[Annotated]:
    """Read Annotations/NAME.xml for every NAME in the list ``names``; images are JPEGImages/NAME.jpg (or png, bmp).

    Corners count from 1 and include the last pixel, as in VOC. Raises DataError, naming the file, for what is missing
    or malformed.
    """
    if not names.is_file():
        raise DataError(f"the list of images {str(names)!r} does not exist; VOC has it in ImageSets/Main")
    found = [_voc_image(folder, line.split()[0]) for line in names.read_text().splitlines() if line.strip()]
    if not found:
        raise DataError(f"the list of images {str(names)!r} is empty")
    return found


def _voc_image(folder: Path, name: str) -> Annotated:
    path = folder / f"Annotations/{name}.xml"
    places = [folder / f"JPEGImages/{name}{suffix}" for suffix in SUFFIXES]
    try:
        root = ElementTree.parse(path).getroot()
        boxes = tuple(_voc_box(node) for node in root.iter("object"))
    except (OSError, ValueError, TypeError, ElementTree.ParseError) as error:
        raise DataError(f"cannot read {str(path)!r} as an annotation of VOC: {error}") from error
    return Annotated(next((p for p in places if p.is_file()), places[0]), boxes, str(path))


def _voc_box(node: ElementTree.Element) -> Box:
    name = node.findtext("name")
    x1, y1, x2, y2 = (node.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax"))
    if name is None or x1 is None or y1 is None or x2 is None or y2 is None:
        raise ValueError("an object lacks its name or a corner of its bndbox")
    first, last = (float(x1), float(y1)), (float(x2), float(y2))
    # a last pixel that is the first would be an object of one pixel: in practice it is a slip of the pen
    start = tuple(f - 1 for f in first) if all(a < b for a, b in zip(first, last)) else first
    return Box(name.strip(), (*start, *last))


def read_coco(annotations: Path, images: Path) -> tuple[list[Annotated], tuple[str, ...]]:
    """Read COCO's JSON of instances; return the images of ``images`` and the classes by rising id.

    Raises DataError, naming the file, for what is missing or malformed.
    """
    return instances(read_json(annotations), annotations, lambda image: images / image["file_name"])


def read_json(annotations: Path) -> Any:
    """Return what is in a JSON file. Raises DataError, naming it, where it cannot be read."""
    with malformed(annotations):
        return json.loads(annotations.read_text(encoding="utf-8"))


@contextlib.contextmanager
def malformed(annotations: Path) -> Iterator[None]:
    """Turn what a JSON of another form raises into a DataError that names the file."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"the key {error} is missing" if isinstance(error, KeyError) else error
        raise DataError(f"cannot read {str(annotations)!r} as COCO's JSON of instances: {what}") from error


def instances(
    data: Any, annotations: Path, locate: Callable[[dict[str, Any]], Path]
) -> tuple[list[Annotated], tuple[str, ...]]:
    """Return the images in the order of ``data``, which ``annotations`` holds, and the classes by rising id.

    locate: where the file of an entry of "images" is. Raises DataError for what is missing or malformed.
    """
    with malformed(annotations):
        classes = {c["id"]: str(c["name"]) for c in sorted(data["categories"], key=lambda c: c["id"])}
        files = {image["id"]: locate(image) for image in data["images"]}
        for kind, found in (("categories", classes), ("images", files)):
            if len(found) < len(data[kind]):
                raise ValueError(f"two {kind} have the same id")
        boxes: dict[Any, list[Box]] = {key: [] for key in files}
        for given in data["annotations"]:
            if given["image_id"] not in files:
                raise ValueError(f"annotation {given.get('id')} is of image {given['image_id']}, which is not listed")
            boxes[given["image_id"]].append(_coco_box(given, classes))
    if not files:
        raise DataError(f"{str(annotations)!r} lists no images")
    return [Annotated(file, tuple(boxes[key]), str(annotations)) for key, file in files.items()], tuple(
        classes.values()
    )


def _coco_box(given: dict[str, Any], classes: dict[Any, str]) -> Box:
    x, y, width, height = (float(value) for value in given["bbox"])
    name = classes.get(given["category_id"], f"category {given['category_id']}")
    area = None if given.get("area") is None else float(given["area"])
    return Box(name, (x, y, x + width, y + height), bool(given.get("iscrowd", 0)), area)


def class_names(records: Iterable[Annotated]) -> tuple[str, ...]:
    """Return the classes that occur, in alphabetical order."""
    return tuple(sorted({box.name for record in records for box in record.boxes}))


def load_examples(
    records: Sequence[Annotated], classes: Sequence[str], size: tuple[int, int], skipped: Skipped, **fields: Any
) -> DetectionExamples:
    """Decode the images, scale them to ``size`` (height, width), and check their boxes.

    fields: further ones of ``DetectionExamples``. Raises DataError, naming the file, for an image that is missing or
    does not decode, a box outside of its image or of zero area, and an unknown class; ``skipped`` may allow them.
    """
    read = [(record, *found) for record in records if (found := _read(record, classes, size, skipped)) is not None]
    if not read:
        raise DataError(f"none of {len(records)} images can be used; the first problem: {skipped.notes[0]}")
    return DetectionExamples(
        images=torch.stack([image for _, image, _, _ in read]),
        objects=tuple(objects for _, _, objects, _ in read),
        sizes=torch.tensor([before for _, _, _, before in read]),
        names=tuple(record.image.name for record, _, _, _ in read),
        classes=tuple(classes),
        **fields,
    )


def _read(
    record: Annotated, classes: Sequence[str], size: tuple[int, int], skipped: Skipped
) -> tuple[Tensor, Objects, tuple[int, int]] | None:
    """Return image, objects, and the size before scaling; None where the image is skipped."""
    from torchvision.transforms.v2 import functional as vision

    if not record.image.is_file():
        skipped.meet(f"{record.source}: its image {str(record.image)!r} does not exist")
        return None
    try:
        pixels = torch.from_numpy(decode(record.image, str(record.image), "RGB")).permute(2, 0, 1)
    except DataError as error:
        skipped.meet(str(error))
        return None
    before = (int(pixels.shape[1]), int(pixels.shape[2]))
    good = [box for box in record.boxes if _check(box, classes, before, record, skipped)]
    return vision.resize(pixels, list(size), antialias=True), _objects(good, classes, before), before


def _check(box: Box, classes: Sequence[str], size: tuple[int, int], record: Annotated, skipped: Skipped) -> bool:
    """Tell whether a box is good. Raises DataError where it is not and may not be skipped."""
    (height, width), (x1, y1, x2, y2) = size, box.corners
    where = f"{record.source}: the box {[round(c, 2) for c in box.corners]} of {box.name!r} on {record.image.name}"
    if box.name not in classes:
        skipped.meet(f"{where} has an unknown class{nearest(box.name, classes)}; known: {list(classes)}")
    elif not (x2 > x1 and y2 > y1):  # also where a number is NaN
        skipped.meet(f"{where} has no area")
    elif (
        min(x1, y1) < -SLACK
        or x2 > width + SLACK
        or y2 > height + SLACK
        or not (
            min(x2, y2) > 0 and x1 < width and y1 < height  # else nothing is left of it when the slack is cut off
        )
    ):
        skipped.meet(f"{where} is outside of the image of {width} x {height} pixels")
    else:
        return True
    return False


def _objects(boxes: Sequence[Box], classes: Sequence[str], size: tuple[int, int]) -> Objects:
    corners = torch.tensor([box.corners for box in boxes], dtype=torch.float32).reshape(-1, 4)
    limit = torch.tensor([size[1], size[0]] * 2, dtype=torch.float32)
    corners = torch.minimum(corners.clamp(min=0), limit)
    labels = torch.tensor([list(classes).index(box.name) for box in boxes], dtype=torch.int64)
    found = Objects.of(corners, labels)
    areas = [float(area) if box.area is None else box.area for box, area in zip(boxes, found.areas)]
    crowd = torch.tensor([box.crowd for box in boxes], dtype=torch.bool)
    return Objects(corners, labels, crowd, torch.tensor(areas, dtype=torch.float32))
