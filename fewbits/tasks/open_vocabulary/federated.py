"""Readers of boxes with many classes: the JSON of LVIS (Gupta et al. 2019) and that of Objects365 (Shao et al. 2019).

Classes are texts for a text encoder, see ``as_text``. COCO's JSON is read by ``fewbits.tasks.annotations``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbits.errors import DataError
from fewbits.tasks.annotations import Annotated, instances, malformed, read_json
from fewbits.tasks.open_vocabulary.truth import Verified
from fewbits.tasks.open_vocabulary.words import Groups

FREQUENCY = {"f": "frequent", "c": "common", "r": "rare"}  # over 100, 11 to 100, up to 10 images of LVIS' training part


@dataclass(frozen=True)
class Federated:
    """What LVIS' JSON holds: images and classes (by rising id) as texts, classes by frequency, and what was verified.

    verified: by the name of the image's file.
    """

    records: list[Annotated]
    classes: tuple[str, ...]
    groups: Groups
    verified: Mapping[str, Verified]


def as_text(name: str) -> str:
    """Return a category as words: "bow_(weapon)" -> "bow weapon", "Cabinet/shelf" -> "cabinet shelf"."""
    return " ".join(re.sub(r"[_()/]", " ", name).lower().split())


def read_lvis(annotations: Path, images: Path) -> Federated:
    """Read LVIS' JSON. images: the folder with COCO's train2017 and val2017, from which LVIS takes its images.

    Raises DataError, naming the file, for what is missing, malformed or contradicts itself.
    """
    data = _in_words(read_json(annotations), annotations)
    records, classes = instances(data, annotations, lambda image: _lvis_file(image, images))
    with malformed(annotations):
        names = {c["id"]: c["name"] for c in data["categories"]}
        frequency = {c["name"]: c["frequency"] for c in data["categories"]}
        groups = {group: tuple(n for n in classes if frequency[n] == key) for key, group in FREQUENCY.items()}
        if sum(map(len, groups.values())) < len(classes):
            raise ValueError(f"the frequency of a category is one of {list(FREQUENCY)}")
        verified = {
            record.image.name: _verified(record, image, names) for record, image in zip(records, data["images"])
        }
        if len(verified) < len(records):
            raise ValueError("two images have the same file name")
    return Federated(records, classes, groups, verified)


def read_objects365(annotations: Path, images: Path) -> tuple[list[Annotated], tuple[str, ...]]:
    """Read Objects365's JSON; return the images and the classes by rising id, as texts.

    images: the folder that holds the files as they are listed (images/v1/patch8/NAME.jpg), or below it patch8/NAME.jpg
    or NAME.jpg. Objects that are marked as fake (pictures, dolls) count as the others do. Raises DataError, naming the
    file, for what is missing or malformed.
    """
    data = _in_words(read_json(annotations), annotations)

    def locate(image: dict[str, Any]) -> Path:
        listed = Path(image["file_name"])
        return _first(images / listed, images.joinpath(*listed.parts[-2:]), images / listed.name)

    return instances(data, annotations, locate)


def _in_words(data: Any, annotations: Path) -> Any:
    """Return what a JSON holds with texts for the names of categories."""
    with malformed(annotations):
        texts = dict[str, str]()
        for category in data["categories"]:
            text = as_text(category["name"])
            if text in texts:
                both = texts[text], category["name"]
                raise ValueError(f"the categories {both} are the same text {text!r}; rename one of them")
            texts[text] = category["name"]
        return {**data, "categories": [{**c, "name": as_text(c["name"])} for c in data["categories"]]}


def _lvis_file(image: dict[str, Any], images: Path) -> Path:
    """Return where an image is: LVIS has its address in COCO, or (in other data of this form) a file_name."""
    if "coco_url" not in image:
        return images / str(image["file_name"])
    parts = str(image["coco_url"]).split("/")[-2:]
    return _first(images.joinpath(*parts), images / parts[-1])


def _first(*paths: Path) -> Path:
    return next((path for path in paths if path.is_file()), paths[0])


def _verified(record: Annotated, image: Any, names: Mapping[Any, str]) -> Verified:
    """Return what is known of one image. Raises DataError where a class is said to be absent that is marked."""
    absent = frozenset(names[key] for key in image["neg_category_ids"])
    both = absent & {box.name for box in record.boxes}
    if both:
        raise DataError(
            f"{record.source}: image {image['id']} has objects of {sorted(both)[0]!r}, which its neg_category_ids say "
            "is not there; correct one of them"
        )
    return Verified(absent, frozenset(names[key] for key in image["not_exhaustive_category_ids"]))
