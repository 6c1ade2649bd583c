"""Which query of a student belongs to which of its teacher, where detectors choose their queries by themselves.

DETR-like detectors of one architecture take different proposals, so that equal indices mean nothing. arXiv 2603.05964
v3 distils the best queries of each object; how they are paired is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import TrainingError

QUERIES = 10  # of an object, at most


@dataclass(frozen=True)
class Pairs:
    """Which queries are compared; int64 [B, P] each.

    student, teacher: index of the query, 0 where there is no pair. object: the object of the pair, -1 where there is
    none.
    """

    student: Tensor
    teacher: Tensor
    object: Tensor

    def labels(self, labels: Tensor) -> Tensor:
        """Return the label of each pair, int64 [B, P], -1 where there is none; labels: of the objects, [B, M]."""
        if not labels.shape[1]:
            return self.object
        found = labels.long().gather(1, self.object.clamp(min=0))
        return torch.where(self.object >= 0, found, -1)

    def of_student(self, values: Tensor) -> Tensor:
        """Return the student's values [B, queries, ...] of the pairs, [B, P, ...]."""
        return _rows(values, self.student)

    def of_teacher(self, values: Tensor) -> Tensor:
        """Return the teacher's values [B, queries, ...] of the pairs, [B, P, ...]."""
        return _rows(values, self.teacher)


def rank_pairs(student: Tensor, teacher: Tensor, count: int = QUERIES) -> Pairs:
    """Pair the r-th best query of the student for an object with the r-th best of the teacher.

    student, teacher: how well each query fits each object, [B, M, queries], at least 0, 0 where it must not be taken,
    such as in rows of padding; the models may differ in queries. An object has as many pairs as the model with fewer
    queries for it. Raises TrainingError for shapes that do not fit and a count below 1.
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise TrainingError(
            f"fits of the student {list(student.shape)} and the teacher {list(teacher.shape)} must have the same "
            "images and objects"
        )
    mine, theirs = best(student, count), best(teacher, count)
    ranks = min(mine.shape[-1], theirs.shape[-1])
    mine, theirs = mine[..., :ranks], theirs[..., :ranks]
    return _pairs(mine, theirs, (mine >= 0) & (theirs >= 0))


def shared_pairs(teacher: Tensor, count: int = QUERIES) -> Pairs:
    """Pair equal indices at the teacher's best queries, for a student that was given the teacher's proposals.

    teacher and errors: as in ``rank_pairs``.
    """
    theirs = best(teacher, count)
    return _pairs(theirs, theirs, theirs >= 0)


def best(fit: Tensor, count: int) -> Tensor:
    """Return the best queries of each object, best first, int64 [B, M, min(count, queries)], -1 where there is none.

    A query that is among the best of several objects stays with the one it fits best.
    """
    if fit.ndim != 3 or count < 1:
        raise TrainingError(
            f"need fits [B, objects, queries] and a count of at least 1, got {list(fit.shape)}, {count}"
        )
    if not fit.shape[1]:
        return fit.new_zeros(len(fit), 0, min(count, fit.shape[2]), dtype=torch.int64)
    values, order = fit.topk(min(count, fit.shape[2]), -1)
    chosen = torch.zeros_like(fit).scatter_(-1, order, values)
    owner = chosen.argmax(1)  # [B, queries]
    objects = torch.arange(fit.shape[1], device=fit.device)[:, None]
    own = owner[:, None].expand_as(fit).gather(-1, order) == objects
    kept = own & (values > 0)
    first = torch.argsort(~kept, dim=-1, stable=True)  # close the gaps that given-up queries leave
    return torch.where(kept, order, -1).gather(-1, first)


def _pairs(student: Tensor, teacher: Tensor, there: Tensor) -> Pairs:
    objects = torch.arange(there.shape[1], device=there.device)[:, None].expand_as(there)
    flat = [torch.where(there, x, fill).flatten(1) for x, fill in ((student, 0), (teacher, 0), (objects, -1))]
    return Pairs(*flat)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    shape = (*index.shape, *values.shape[2:])
    return values.gather(1, index.reshape(*index.shape, *[1] * (values.ndim - 2)).expand(shape))
