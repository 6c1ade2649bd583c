"""What each stage of a curriculum trains an open-vocabulary detector on (arXiv 2603.05964 v3, 3.2 and 3.3).

The task, plus terms beside the float detector: "feat", the backbone's maps (PKD), and "tpsd", relations of texts and
regions; "region-text" and "region-region" are its two parts alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import TrainingError, nearest
from fewbits.losses.pkd import pkd
from fewbits.tasks.open_vocabulary.detector import OpenVocabularyDetector
from fewbits.tasks.open_vocabulary.loss import detection_loss
from fewbits.tasks.open_vocabulary.regions import Regions
from fewbits.tasks.open_vocabulary.relations import distillation
from fewbits.train.curriculum import Stage
from fewbits.train.distill import require_frozen
from fewbits.train.staging import Loss, StageLoss

FEATURES = "feat"
RELATIONS = {"tpsd": "full", "region-text": "region-text", "region-region": "region-region"}  # and variants of TPSD


@dataclass(frozen=True)
class Weights:
    """lambda_1 of the features, lambda_2 of the relations, and where smooth L1 turns linear."""

    features: float = 6.0
    relations: float = 6.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        for name in ("features", "relations", "beta"):
            if not 0 < getattr(self, name) < math.inf:
                raise TrainingError(f"{name} of distillation is above 0 and finite, got {getattr(self, name)!r}")


def regions(model: nn.Module, images: Tensor) -> Regions:
    """Return what a detector, or its wrapper in training, says of images."""
    found: Regions = model(images, regions=True)
    return found


def task_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the task loss alone, a scalar. batch: images and targets."""
    images, targets = batch
    return detection_loss(regions(model, images), targets).total


def text_anchored(
    student: OpenVocabularyDetector, teacher: OpenVocabularyDetector, weights: Weights | None = None
) -> StageLoss:
    """Return (stage, task loss) -> that loss plus the terms that the stage names, for ``Staged``.

    Give ``task_loss`` to ``fit``: terms need the regions that it is taken of, so a stage with terms has it, and no
    other. Both detectors look for the same texts. In a stage without relations only the teacher's backbone runs. Raises
    TrainingError for a teacher that is not frozen, for another vocabulary, and for an unknown term.
    """
    require_frozen(teacher, student)
    seen = [(model.vocabulary.prompts, model.vocabulary.identity) for model in (student, teacher)]
    if seen[0] != seen[1]:
        raise TrainingError("student and teacher look for different texts: give both one vocabulary, of one encoder")
    weights = weights or Weights()

    def of(stage: Stage, task: Loss) -> Loss:
        for name in stage.distill:
            if name != FEATURES and name not in RELATIONS:
                known = [FEATURES, *RELATIONS]
                raise TrainingError(f"no distillation term {name!r}{nearest(name, known)}; known: {known}")
        return _StageLoss(teacher, stage.distill, weights) if stage.distill else task

    return of


class _StageLoss:
    """The loss of one stage with terms of distillation."""

    def __init__(self, teacher: OpenVocabularyDetector, terms: Sequence[str], weights: Weights) -> None:
        self.teacher, self.terms, self.weights = teacher, terms, weights

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        images, targets = batch
        found = regions(model, images)
        total = detection_loss(found, targets).total
        variants = [RELATIONS[name] for name in self.terms if name in RELATIONS]
        self.teacher.to(images.device)
        with torch.no_grad():
            told = regions(self.teacher, images) if variants else None
            features = self.teacher.backbone(images) if told is None else told.features
        if FEATURES in self.terms:
            total = total + self.weights.features * pkd(found.features, features)
        for variant in variants:
            assert told is not None
            relations = distillation(found, told, targets, variant=variant, beta=self.weights.beta)
            total = total + self.weights.relations * relations
        return total
