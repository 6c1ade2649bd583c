"""Relations of texts and regions in the joint space: distilled from a teacher, and measured against it.

Text-anchored distillation at the positives of the teacher's assignment, and the diagnostics of arXiv 2603.05964 v3: how
far the similarities of regions of one category have moved from those of the float model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import DataError, TrainingError
from fewbits.losses.tpsd import Joint, similarity, tpsd
from fewbits.tasks.open_vocabulary.assign import positives
from fewbits.tasks.open_vocabulary.regions import Regions

LEAST = 10  # regions of a category on an image that is measured, as in the paper


def distillation(
    student: Regions, teacher: Regions, targets: Tensor, *, variant: str = "full", beta: float = 1.0
) -> Tensor:
    """Return TPSD of a batch, a scalar without its weight, at the points that the teacher's answer assigns.

    targets: [B, M, 5]; see ``assigned``. variant, beta and errors: see ``tpsd``.
    """
    _check(student, teacher)
    return tpsd(
        Joint(student.embeddings, student.texts),
        Joint(teacher.embeddings, teacher.texts),
        positives(teacher, targets),
        variant=variant,
        beta=beta,
    )


@dataclass(frozen=True)
class Relation:
    """The positives of one category on one image, as student and teacher see them; row 0 is the text.

    image: its index in the batch. label: of the text. points: int64 [N]. student, teacher: cosine similarities in the
    joint space, [1 + N, 1 + N]. student_scores, teacher_scores: of every text, 0..1, [N, T].
    """

    image: int
    label: int
    points: Tensor
    student: Tensor
    teacher: Tensor
    student_scores: Tensor
    teacher_scores: Tensor

    @property
    def error(self) -> float:
        """Return the mean absolute difference of the similarities of two regions."""
        return float((_pairs(self.student[1:, 1:]) - _pairs(self.teacher[1:, 1:])).abs().mean())

    @property
    def score_error(self) -> float:
        """Return the same of the regions' vectors of scores, compared by their cosine, too."""
        mine, theirs = similarity(self.student_scores), similarity(self.teacher_scores)
        return float((_pairs(mine) - _pairs(theirs)).abs().mean())

    @property
    def correlation(self) -> float:
        """Return Pearson's r between the two models' similarities of two regions; 0 where either is constant."""
        return _pearson(_pairs(self.student[1:, 1:]), _pairs(self.teacher[1:, 1:]))


@torch.no_grad()
def relations(student: Regions, teacher: Regions, targets: Tensor, least: int = LEAST) -> list[Relation]:
    """Return every category of every image with at least ``least`` positives of the teacher, on the CPU.

    Raises TrainingError unless ``least`` is at least 2: one region has no relation.
    """
    _check(student, teacher)
    if least < 2:
        raise TrainingError(f"relations need at least 2 regions, got least={least}")
    labels, found = positives(teacher, targets), []
    for image in range(len(labels)):
        for label in torch.unique(labels[image][labels[image] >= 0]).tolist():
            points = (labels[image] == label).nonzero().flatten()
            if len(points) >= least:
                found.append(_relation(student, teacher, image, label, points))
    return found


def _relation(student: Regions, teacher: Regions, image: int, label: int, points: Tensor) -> Relation:
    grams, scores = [], []
    for model in (student, teacher):
        grams.append(similarity(torch.cat([model.texts[label][None], model.embeddings[image, points]])).cpu())
        scores.append(model.logits[image, points].float().sigmoid().cpu())
    return Relation(image, label, points.cpu(), *grams, *scores)


@dataclass(frozen=True)
class Drift:
    """How far a student is from its teacher over all relations, each counted once.

    count: of relations. embedding_error, score_error: mean absolute errors of similarities of two regions, in the joint
    space and of score vectors. agreement: Spearman's rank correlation of the two over the relations. correlation: mean
    Pearson's r of the similarities. confidence, teacher_confidence: mean score of the right text.
    """

    count: int
    embedding_error: float
    score_error: float
    agreement: float
    correlation: float
    confidence: float
    teacher_confidence: float


def drift(found: Sequence[Relation]) -> Drift:
    """Summarise the relations of a data set. Raises DataError where there is none."""
    if not found:
        raise DataError("no category has enough positives on any image: give more images, or a smaller 'least'")
    errors, scores = torch.tensor([[r.error, r.score_error] for r in found]).T
    return Drift(
        len(found),
        float(errors.mean()),
        float(scores.mean()),
        _pearson(_ranks(errors), _ranks(scores)),
        float(torch.tensor([r.correlation for r in found]).mean()),
        float(torch.stack([r.student_scores[:, r.label].mean() for r in found]).mean()),
        float(torch.stack([r.teacher_scores[:, r.label].mean() for r in found]).mean()),
    )


def _pairs(matrix: Tensor) -> Tensor:
    """Return the entries above the diagonal: those on it are 1, and the others are the same."""
    row, column = torch.triu_indices(len(matrix), len(matrix), 1)
    return matrix[row, column]


def _ranks(values: Tensor) -> Tensor:
    """Return the mean rank of each value, so that equal values share one."""
    below, equal = values < values[:, None], values == values[:, None]
    return below.sum(1) + (equal.sum(1) - 1) / 2


def _pearson(a: Tensor, b: Tensor) -> float:
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else 0.0


def _check(student: Regions, teacher: Regions) -> None:
    if student.logits.shape != teacher.logits.shape:
        raise TrainingError(
            f"the student answers {list(student.logits.shape)} (images, points, texts), the teacher "
            f"{list(teacher.logits.shape)}: give both the same images and texts"
        )
