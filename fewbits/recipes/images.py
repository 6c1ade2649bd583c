"""Classification as a task of recipes: the images and the float model."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fewbits.errors import DataError
from fewbits.recipes.schema import Data, Recipe
from fewbits.recipes.task import Answer, Pair, Task
from fewbits.tasks.classification import cross_entropy, predict, score
from fewbits.tasks.data import ImageExamples, LabelledImages, shared_data_dir
from fewbits.tasks.models import build_model
from fewbits.tasks.sources import load
from fewbits.train.loop import Loss

SHAPES = {"digits": (1, 8, 8), "fashion_mnist": (1, 28, 28), "nih_cxr64": (1, 32, 32)}  # of stand-ins; others: RGB
GROUPED = ("cifar10_groups", "isic2017", "nih_cxr64", "manifest")  # whose stand-ins have groups, too
STAND_IN_CLASSES = 10


@dataclass(frozen=True)
class Images(Task[LabelledImages]):
    """Images of classes; see ``Task``."""

    headline: ClassVar[str] = "top1"
    accuracy: ClassVar[str] = "top1"
    shown: ClassVar[int] = 64

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.test.classes

    def build(self, recipe: Recipe) -> tuple[nn.Module, tuple[str, ...]]:
        """See ``build``."""
        return build(recipe, self)

    def loss(self, label_smoothing: float = 0.0) -> Loss:
        """See ``Task``."""
        return functools.partial(cross_entropy, label_smoothing=label_smoothing)

    def answers(self, model: Answer, examples: LabelledImages, batch_size: int) -> Iterator[Pair]:
        """See ``Task``; the logits of all images at once."""
        yield predict(model, examples, batch_size), examples.labels

    def score(self, pairs: Iterable[Pair], examples: LabelledImages) -> dict[str, Any]:
        """See ``Task``."""
        logits, labels = zip(*pairs)
        return score(torch.cat(logits), torch.cat(labels))

    def some(self, count: int, batch_size: int, seed: int) -> Iterator[Pair]:
        """See ``Task``; every class has its share."""
        return self.train.subset(min(count, len(self.train)), seed).batches(batch_size)


def load_images(recipe: Recipe) -> Images:
    """Load what the recipe names. Raises DataError, saying where to put the data, where it is not there."""
    data, notes = recipe.data, []
    try:
        path = None if data.path == "auto" else Path(data.path).expanduser()
        train, test = (load(data.source, path, split, **data.options) for split in ("train", "test"))
    except DataError as error:
        if not data.stand_in or data.path != "auto":
            raise DataError(f"{error}. {_cure(data)}") from error
        train, test = _stand_ins(data)
        notes.append(f"random images in place of {data.source!r} ({error}): accuracies mean nothing")
    if data.train_examples is not None:
        train = train.subset(min(data.train_examples, len(train)), recipe.seed)
    if data.test_examples is not None:
        test = test.subset(min(data.test_examples, len(test)), recipe.seed)
    validation = None
    if data.validation:
        validation, train = train.split(data.validation, recipe.seed)
    return Images(train, validation, test, tuple(notes))


def build(recipe: Recipe, images: Images) -> tuple[nn.Module, tuple[str, ...]]:
    """Build the float model, seeded, with its weights; return it and what a reader must know of it.

    Raises RecipeError for an unknown model, CheckpointError for weights that do not fit, DataError where the
    weights are not there.
    """
    torch.manual_seed(recipe.seed)
    options: dict[str, Any] = dict(recipe.model.options)
    classes, channels = len(images.test.classes), images.test.shape[0]
    path, notes = float_weights(recipe)
    if path is not None:
        options |= {"pretrained_path": path, "pretrained_skip": recipe.model.skip}
    return build_model(recipe.model.name, classes, channels, **options), notes


def float_weights(recipe: Recipe) -> tuple[Path | None, tuple[str, ...]]:
    """Return the file of the float weights that the recipe names, if any, and what a reader must know of it.

    Raises DataError where it is not there, unless stand-ins will do.
    """
    if recipe.model.weights is None:
        return None, ()
    path = find_weights(recipe.model.weights)
    if path is not None:
        return path, ()
    if not recipe.data.stand_in:
        raise DataError(
            f"the float weights {recipe.model.weights!r} are not there, neither as a path nor in ../shared/data; "
            "give their file with --set model.weights=FILE, or train from nothing with --set model.weights=null"
        )
    return None, (f"random weights in place of {recipe.model.weights!r}, which is not there",)


def find_weights(name: str) -> Path | None:
    """Return the file of float weights: as it stands, or in the shared data folder; None if it is in neither."""
    shared = shared_data_dir()
    places = [Path(name).expanduser(), *([shared / name] if shared else [])]
    return next((place for place in places if place.is_file()), None)


def _cure(data: Data) -> str:
    if data.path != "auto":
        return "Correct it with --set data.path=FOLDER"
    return (
        f"Put {data.source!r} (its official files, or train*.zip and test*.zip of class folders) into a folder and "
        "name it with --set data.path=FOLDER; --smoke runs without data"
    )


def _stand_ins(data: Data) -> tuple[ImageExamples, ImageExamples]:
    """Return random images that a class colours, so that there is something to learn."""
    side = int(data.options.get("size", 224)) if data.source == "imagefolder" else 32
    shape = SHAPES.get(data.source, (3, side, side))
    made = []
    for seed, count in ((0, data.train_examples or 160), (1, data.test_examples or 80)):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % STAND_IN_CLASSES
        noise = torch.randint(0, 100, (count, *shape), generator=generator)
        images = (noise + 15 * labels[:, None, None, None]).to(torch.uint8)
        classes = tuple(f"class {k}" for k in range(STAND_IN_CLASSES))
        mean, std = (0.5,) * shape[0], (0.25,) * shape[0]
        groups: dict[str, Any] = {}
        if data.source in GROUPED:
            groups = {"groups": torch.arange(count) // STAND_IN_CLASSES % 2, "group_names": ("one", "other")}
        made.append(ImageExamples(images=images, labels=labels, classes=classes, mean=mean, std=std, **groups))
    return made[0], made[1]
