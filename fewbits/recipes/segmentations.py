"""Segmentation as a task of recipes: the images, their masks, and the float model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fewbits.errors import DataError
from fewbits.layers import in_eval
from fewbits.recipes.images import float_weights
from fewbits.recipes.schema import Recipe
from fewbits.recipes.schema import Segmentation as Rules
from fewbits.recipes.task import SENSITIVITY_EXAMPLES, Answer, Pair, Task
from fewbits.report.pictures import class_colours, colours, hex_colour, photo
from fewbits.tasks.masks import IGNORE
from fewbits.tasks.segmentation import PixelLoss, answers, balanced_weights, check_weights, score
from fewbits.tasks.segmentation_sources import DEFAULTS, SCENES, load_segmentation
from fewbits.tasks.segmented import Read, SegmentedImages
from fewbits.tasks.segmenters import build_segmenter
from fewbits.train.loop import Loss

PICTURED = 4  # test images in the report
NO_CLASS = (128, 128, 128)  # its colour in pictures


@dataclass(frozen=True)
class Segmentations(Task[SegmentedImages]):
    """Images of which every pixel has a class; see ``Task``. rules: loss and metric of the recipe."""

    headline: ClassVar[str] = "miou"
    accuracy: ClassVar[str] = "miou"
    shown: ClassVar[int] = 4

    rules: Rules = field(default_factory=Rules)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.test.classes

    def build(self, recipe: Recipe) -> tuple[nn.Module, tuple[str, ...]]:
        """See ``Task``. Raises RecipeError for an unknown model, CheckpointError for weights that do not fit."""
        torch.manual_seed(recipe.seed)
        options: dict[str, Any] = dict(recipe.model.options)
        path, notes = float_weights(recipe)
        if path is not None:
            options |= {"pretrained_path": path, "pretrained_skip": recipe.model.skip}
        return build_segmenter(recipe.model.name, len(self.classes), **options), notes

    def loss(self, label_smoothing: float = 0.0) -> Loss:
        """See ``Task``; balanced class weights are those of the training images."""
        given = self.rules.class_weights
        weights = None
        if given is not None:
            weights = balanced_weights(self.train) if given == "balanced" else check_weights(given, self.classes)
        parts = self.rules.cross_entropy, self.rules.dice
        return PixelLoss(*parts, weights, ground=self.train.ground, label_smoothing=label_smoothing)

    def answers(self, model: Answer, examples: SegmentedImages, batch_size: int) -> Iterator[Pair]:
        """See ``Task``; batch by batch, as the logits of all pixels are too many to keep."""
        return answers(model, examples, batch_size)

    def score(self, pairs: Iterable[Pair], examples: SegmentedImages) -> dict[str, Any]:
        """See ``Task``."""
        return score(pairs, examples.ground, self.rules.tolerance)

    def agreement(self, got: Tensor, want: Tensor) -> Tensor:
        """See ``Task``; every pixel is an answer, and the scores are on axis 1."""
        return (got.argmax(1) == want.argmax(1)).flatten()

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
        """See ``Task``: image, right mask, the answer of each form, and where the first and the last form differ."""
        palette = [*class_colours(len(self.classes)), NO_CLASS]
        rows = []
        for index in torch.linspace(0, len(self.test) - 1, min(PICTURED, len(self.test))).long().tolist():
            inputs, _ = self.test.gather([index])
            image, mask = self.test.picture(index)
            masks = {"right": mask.where(mask != IGNORE, len(self.classes))}
            masks |= {name: _answer(model, inputs) for name, model in forms.items()}
            there = torch.bincount(torch.cat([m.flatten() for m in masks.values()])).nonzero()[:, 0].tolist()
            first, *_, last = (masks[name] for name in forms)
            tiles = [("image", photo(np.ascontiguousarray(image.permute(1, 2, 0).numpy())))]
            tiles += [(name, colours(found.numpy(), palette)) for name, found in masks.items()]
            tiles.append(("where they differ", colours((first != last).long().numpy(), [(0, 0, 0), (255, 255, 255)])))
            names = (*self.classes, "no class")
            rows.append(
                {
                    "tiles": [{"caption": caption, "image": uri} for caption, uri in tiles],
                    "legend": [{"name": names[c], "colour": hex_colour(palette[c])} for c in there],
                }
            )
        return rows


def load_segmentations(recipe: Recipe) -> Segmentations:
    """Load what the recipe names. Raises DataError, saying where to put the data, where it is not there."""
    data, notes = recipe.data, list[str]()
    counts = {"train": data.train_examples, "test": data.test_examples}
    try:
        path = None if data.path == "auto" else Path(data.path).expanduser()
        train, test = load_segmentation(data.source, path, data.options, counts, recipe.seed)
    except DataError as error:
        if not data.stand_in or data.path != "auto":
            raise DataError(
                f"{error}. Name its folder with --set data.path=FOLDER; --smoke runs without data"
            ) from error
        train, test = _stand_ins(recipe, counts)
        notes.append(f"scenes of digits in place of {data.source!r} ({error}): metrics mean nothing")
    validation = None
    if data.validation:
        validation, train = train.split(data.validation, recipe.seed)
    return Segmentations(train, validation, test, tuple(notes), recipe.segmentation or Rules())


def _answer(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the class of every pixel of one image, int64 [H, W]."""
    with in_eval(model), torch.no_grad():
        found: Tensor = model(inputs)[0].argmax(0)
    return found


def _stand_ins(recipe: Recipe, counts: Mapping[str, int | None]) -> tuple[SegmentedImages, SegmentedImages]:
    """Return scenes with as many classes as the source has, in its size."""
    data = recipe.data
    given: dict[str, Any] = {**DEFAULTS.get(data.source, {}), **data.options}
    classes = tuple(given.get("classes") or SCENES)
    look: dict[str, Any] = {key: given[key] for key in ("size", "crop", "ground", "flip") if key in given}
    many = {split: counts.get(split) or 80 for split in ("train", "test")}
    made = load_segmentation("scenes", None, {"side": 64, **look, **many}, None, recipe.seed)
    first, second = (
        dataclasses.replace(s, classes=classes, reads=[functools.partial(_fewer, r, len(classes)) for r in s.reads])
        for s in made
    )
    return first, second


def _fewer(read: Read, classes: int) -> tuple[Tensor, Tensor]:
    """Read a scene, and take those classes that are too many for the last one."""
    image, mask = read()
    return image, mask.clamp(max=classes - 1)
