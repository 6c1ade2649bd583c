"""Open-vocabulary detection as a task of recipes: trained on base classes, measured on all, packed for any words."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fewbits.errors import DataError, RecipeError
from fewbits.layers import in_eval
from fewbits.recipes.detections import Detections
from fewbits.recipes.images import float_weights
from fewbits.recipes.models import OPEN_DETECTOR, is_open_detector
from fewbits.recipes.schema import OpenVocabulary, Recipe
from fewbits.recipes.task import Answer, Pair
from fewbits.report.pictures import heat_map, hex_colour, shade
from fewbits.tasks.detection import DetectionExamples
from fewbits.tasks.detection_metrics import predict
from fewbits.tasks.detection_sources import AUGMENTATION
from fewbits.tasks.open_vocabulary.cache import cached
from fewbits.tasks.open_vocabulary.detector import OpenVocabularyDetector
from fewbits.tasks.open_vocabulary.distill import FEATURES, RELATIONS, Weights, regions, task_loss, text_anchored
from fewbits.tasks.open_vocabulary.lvis_metrics import score_fixed
from fewbits.tasks.open_vocabulary.packed import Card, text_encoder
from fewbits.tasks.open_vocabulary.relations import Relation, relations
from fewbits.tasks.open_vocabulary.sources import load_open
from fewbits.tasks.open_vocabulary.text import TextEncoder
from fewbits.tasks.open_vocabulary.truth import Verified
from fewbits.tasks.open_vocabulary.vocabulary import Vocabulary
from fewbits.tasks.open_vocabulary.words import Groups
from fewbits.tasks.weights import load_weights
from fewbits.train.loop import Loss
from fewbits.train.staging import StageLoss

RELATED = 32  # test images among which the report looks for relations
SCALE = (-1.0, 0.0, 1.0)  # similarities in the legend of relations
AVERAGES = ("map", "map50", "map75")


@dataclass(frozen=True)
class OpenDetections(Detections):
    """Images with boxes of classes that are texts; see ``Task`` and ``Detections``.

    train and validation have the base classes, test has all: a model looks for those of the examples that it is
    measured on, and for the base classes else. groups: names of classes by group. verified: what LVIS knows of images.
    """

    forms: ClassVar[tuple[str, ...]] = ("float", "calibrated", "quantized")
    terms: ClassVar[tuple[str, ...]] = (FEATURES, *RELATIONS)

    groups: Groups = field(default_factory=dict)
    verified: Mapping[str, Verified] | None = None
    rules: OpenVocabulary = field(default_factory=OpenVocabulary)

    @functools.cached_property
    def encoder(self) -> TextEncoder:
        """The frozen encoder of texts. Raises DataError for one that cannot be read."""
        found = text_encoder(self.rules.text, self.rules.width)
        return found if self.rules.cache is None else cached(found, Path(self.rules.cache).expanduser())

    @functools.cached_property
    def base(self) -> Vocabulary:
        """The texts that are trained on."""
        return Vocabulary.of(self.encoder, self.train.classes)

    @functools.cached_property
    def all(self) -> Vocabulary:
        """The texts that are tested on."""
        return Vocabulary.of(self.encoder, self.test.classes)

    def build(self, recipe: Recipe) -> tuple[nn.Module, tuple[str, ...]]:
        """See ``Task``. Raises RecipeError for an unknown model, CheckpointError for weights that do not fit."""
        given = recipe.model
        if not is_open_detector(given.name):
            raise RecipeError(
                f"models of open_vocabulary are {OPEN_DETECTOR}SIZE such as yolo-world:nano, got {given.name!r}"
            )
        if given.options:
            raise RecipeError(f"{given.name!r} has no options, got model.options {given.options}")
        torch.manual_seed(recipe.seed)
        model = OpenVocabularyDetector(_size(recipe), self.base)
        path, notes = float_weights(recipe)
        if path is not None:
            load_weights(model, path, given.skip)
        return model, notes

    def loss(self, label_smoothing: float = 0.0) -> Loss:
        """See ``Task``. Raises RecipeError for label smoothing: targets are alignments, not labels."""
        super().loss(label_smoothing)
        return task_loss

    def stage_loss(self, student: nn.Module, teacher: nn.Module) -> StageLoss | None:
        """See ``Task``: features of the backbone, and relations of texts and regions."""
        assert isinstance(student, OpenVocabularyDetector) and isinstance(teacher, OpenVocabularyDetector)
        return text_anchored(student, teacher, Weights(self.rules.features, self.rules.relations, self.rules.beta))

    def answers(self, model: Answer, examples: DetectionExamples, batch_size: int) -> Iterator[Pair]:
        """See ``Task``; what has a fixed vocabulary, an ONNX file say, is for the test examples."""
        with looking_for(model, self.base if examples.classes == self.train.classes else self.all):
            yield from predict(model, examples, batch_size)

    def score(self, pairs: Iterable[Pair], examples: DetectionExamples) -> dict[str, Any]:
        """See ``Task``: Fixed AP (``lvis_metrics``), over all classes and the groups of them."""
        known = set(examples.classes)
        kept = {group: tuple(name for name in names if name in known) for group, names in self.groups.items()}
        groups = {group: names for group, names in kept.items() if names}
        scored = score_fixed((outputs for outputs, _ in pairs), examples, groups, self.verified)
        by_group = {f"map_{group}": value for group, value in scored["groups"].items()}
        return {**{name: scored[name] for name in AVERAGES}, **by_group, "per_class": scored["per_class"]}

    def deployed(self, model: nn.Module) -> nn.Module:
        """See ``Task``: for the texts of the test."""
        assert isinstance(model, OpenVocabularyDetector)
        return model.reparameterize(self.all)

    def about(self, recipe: Recipe) -> dict[str, Any]:
        """See ``Task``: what it takes to ask the detector for other words."""
        mean, std = tuple(self.train.mean), tuple(self.train.std)
        encoder, side = self.encoder, self.train.shape[1:]
        return Card(_size(recipe), self.rules.text, encoder.width, encoder.identity, side, mean, std).about()

    def pictures(self, forms: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
        """See ``Task``: boxes, and the relations of one text and its regions beside those of the float model."""
        with contextlib.ExitStack() as stack:
            for model in forms.values():
                stack.enter_context(looking_for(model, self.all))
            return [*super().pictures(forms), *self._relations(forms)]

    def _relations(self, forms: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
        images, targets = self.test.gather(range(min(RELATED, len(self.test))))
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for model in forms.values():
                stack.enter_context(in_eval(model))
            seen = {name: regions(model, images) for name, model in forms.items()}
        teacher = seen.pop("float")
        found = {name: relations(student, teacher, targets) for name, student in seen.items()}
        first = next(iter(found.values()), [])  # all have the same categories: those of the teacher's assignment
        if not first:
            return []
        largest = max(range(len(first)), key=lambda i: len(first[i].points))
        return [_row({name: each[largest] for name, each in found.items()}, self.test.classes)]


def _row(found: Mapping[str, Relation], classes: tuple[str, ...]) -> dict[str, Any]:
    """Return one row of the report: cosine similarities of a text (first) and its regions, by form of the model."""
    first = next(iter(found.values()))
    what = f"{classes[first.label]}: similarities of the text (first) and {len(first.points)} regions"
    tiles = [{"caption": f"{what}, float", "image": heat_map(first.teacher.numpy())}]
    for name, one in found.items():
        caption = f"{name}: mean difference {one.error:.3f}, r {one.correlation:.2f}"
        tiles.append({"caption": caption, "image": heat_map(one.student.numpy())})
    legend = [{"name": f"{value:+.0f}" if value else "0", "colour": hex_colour(shade(value))} for value in SCALE]
    return {"tiles": tiles, "legend": legend}


@contextlib.contextmanager
def looking_for(model: Callable[..., Any], vocabulary: Vocabulary) -> Iterator[None]:
    """Let a detector look for these texts for the while, unless its vocabulary is fixed."""
    if not isinstance(model, OpenVocabularyDetector) or model.baked is not None:
        yield
        return
    before = model.vocabulary
    model.set_vocabulary(vocabulary)
    try:
        yield
    finally:
        model.set_vocabulary(before)


def load_open_detections(recipe: Recipe) -> OpenDetections:
    """Load what the recipe names. Raises DataError, saying where to put the data, where it is not there."""
    data, more = recipe.data, list[str]()
    counts = {"train": data.train_examples, "test": data.test_examples}
    try:
        path = None if data.path == "auto" else Path(data.path).expanduser()
        found = load_open(data.source, path, data.options, counts, recipe.seed)
    except DataError as error:
        if data.source == "composed":
            raise
        if not data.stand_in or data.path != "auto":
            raise DataError(
                f"{error}. Name its folder with --set data.path=FOLDER; --smoke runs without data"
            ) from error
        options = {key: value for key, value in data.options.items() if key in AUGMENTATION}
        found = load_open("composed", None, options, counts, recipe.seed)
        more.append(f"composed scenes in place of {data.source!r} ({error}): metrics mean nothing")
    train, validation = found.train, None
    if data.validation:
        validation, train = train.split(data.validation, recipe.seed)
    rules = recipe.open_vocabulary or OpenVocabulary()
    return OpenDetections(train, validation, found.test, (*found.notes, *more), found.groups, found.verified, rules)


def _size(recipe: Recipe) -> str:
    return recipe.model.name.removeprefix(OPEN_DETECTOR)
