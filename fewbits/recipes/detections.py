"""Detection as a task of recipes: images with boxes, and the float model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fewbits.errors import DataError, RecipeError
from fewbits.layers import in_eval
from fewbits.recipes.images import float_weights
from fewbits.recipes.schema import Recipe
from fewbits.recipes.task import SENSITIVITY_EXAMPLES, Answer, Pair, Task
from fewbits.report.pictures import MOST_SIDE, class_colours, hex_colour, photo
from fewbits.tasks.detection import DetectionExamples
from fewbits.tasks.detection_metrics import SEEN, detections, predict, same_detections, score
from fewbits.tasks.detection_sources import AUGMENTATION, load_detection
from fewbits.tasks.detector import own_detector
from fewbits.tasks.library_detectors import LIBRARY, library_detector
from fewbits.tasks.weights import load_weights
from fewbits.train.loop import Loss

PICTURED = 4  # test images in the report


@dataclass(frozen=True)
class Detections(Task[DetectionExamples]):
    """Images with boxes of classes; see ``Task``. Outputs are [B, points, 4 + classes], before suppression."""

    headline: ClassVar[str] = "map"
    accuracy: ClassVar[str] = "map"
    shown: ClassVar[int] = 8

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.test.classes

    def build(self, recipe: Recipe) -> tuple[nn.Module, tuple[str, ...]]:
        """See ``Task``. Raises RecipeError for an unknown model, CheckpointError for weights that do not fit."""
        torch.manual_seed(recipe.seed)
        given, count = recipe.model, len(self.classes)
        path, notes = float_weights(recipe)
        if given.name.startswith(LIBRARY):
            model: nn.Module = library_detector(given.name, count, **given.options)
            inner = model.get_submodule("model")  # a file of torchvision's holds its tensors
        elif given.options:
            raise RecipeError(f"{given.name!r} has no options, got model.options {given.options}")
        else:
            model = inner = own_detector(given.name, count)
        if path is not None:
            load_weights(inner, path, given.skip)
        return model, notes

    def loss(self, label_smoothing: float = 0.0) -> Loss:
        """See ``Task``. Raises RecipeError for label smoothing: targets are alignments, not labels."""
        if label_smoothing:
            raise RecipeError(f"detection has no label_smoothing, got {label_smoothing}; leave it out")
        return detection_loss

    def answers(self, model: Answer, examples: DetectionExamples, batch_size: int) -> Iterator[Pair]:
        """See ``Task``; outputs beside targets."""
        return predict(model, examples, batch_size)

    def score(self, pairs: Iterable[Pair], examples: DetectionExamples) -> dict[str, Any]:
        """See ``Task``; against all objects of the examples, crowds too, which targets do not hold."""
        return score((outputs for outputs, _ in pairs), examples)

    def agreement(self, got: Tensor, want: Tensor) -> Tensor:
        """See ``Task``; every detection is an answer, by class and place."""
        return same_detections(got, want)

    def some(self, count: int, batch_size: int, seed: int) -> Iterator[Pair]:
        """See ``Task``."""
        return self.train.subset(min(count, len(self.train)), seed).batches(batch_size)

    def calibration(self, recipe: Recipe) -> list[Tensor]:
        """See ``Task``; in batches as in evaluation, since what all images need at once may not fit into memory."""
        given = recipe.evaluate
        return [images for images, _ in self.some(given.calibration_examples, given.batch_size, recipe.seed)]

    def sensitivity(self, recipe: Recipe) -> Iterator[Pair]:
        """See ``Task``; in batches as in evaluation."""
        return self.some(SENSITIVITY_EXAMPLES, recipe.evaluate.batch_size, recipe.seed)

    def pictures(self, forms: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
        """See ``Task``: the right boxes, and those that each form sees."""
        rows = []
        for index in torch.linspace(0, len(self.test) - 1, min(PICTURED, len(self.test))).long().tolist():
            inputs, targets = self.test.gather([index])
            found: dict[str, Boxes] = {
                "right": [(int(label), corners) for label, *corners in targets[0].tolist() if label >= 0]
            }
            found |= {name: _seen(model, inputs) for name, model in forms.items()}
            image, there = self.test.images[index], sorted({label for boxes in found.values() for label, _ in boxes})
            palette = class_colours(len(self.classes) + 1)[1:]
            tiles = [{"caption": name, "image": drawn(image, boxes, palette)} for name, boxes in found.items()]
            legend = [{"name": self.classes[c], "colour": hex_colour(palette[c])} for c in there]
            rows.append({"tiles": tiles, "legend": legend})
        return rows


Boxes = Sequence[tuple[int, Sequence[float]]]  # class, and corners in pixels


def detection_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a detector for a batch of images and targets."""
    loss: Tensor = model(*batch)
    return loss


def load_detections(recipe: Recipe) -> Detections:
    """Load what the recipe names. Raises DataError, saying where to put the data, where it is not there."""
    data, more = recipe.data, list[str]()
    counts = {"train": data.train_examples, "test": data.test_examples}
    try:
        path = None if data.path == "auto" else Path(data.path).expanduser()
        train, test, notes = load_detection(data.source, path, data.options, counts, recipe.seed)
    except DataError as error:
        if not data.stand_in or data.path != "auto":
            raise DataError(
                f"{error}. Name its folder with --set data.path=FOLDER; --smoke runs without data"
            ) from error
        options = {key: value for key, value in data.options.items() if key in AUGMENTATION}
        train, test, notes = load_detection("scenes", None, options, counts, recipe.seed)
        more.append(f"scenes of digits in place of {data.source!r} ({error}): metrics mean nothing")
    validation = None
    if data.validation:
        validation, train = train.split(data.validation, recipe.seed)
    return Detections(train, validation, test, (*notes, *more))


def drawn(image: Tensor, boxes: Boxes, palette: Sequence[tuple[int, int, int]]) -> str:
    """Return an image uint8 [3, H, W] with boxes in the colours of their classes, as a data URI."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    factor = max(1, MOST_SIDE // max(picture.size))  # small images grow, so that lines do not hide what is in them
    picture = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for label, corners in boxes:
        x1, y1, x2, y2 = (factor * c for c in corners)
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=palette[label], width=2)
    return photo(np.asarray(picture))


def _seen(model: nn.Module, inputs: Tensor) -> Boxes:
    with in_eval(model), torch.no_grad():
        found = detections(model(inputs))[0].above(SEEN)
    return list(zip(found.labels.tolist(), found.boxes.tolist()))
