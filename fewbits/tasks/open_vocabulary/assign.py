"""Which points are to find which objects: the task-aligned assignment of open-vocabulary detectors.

TOOD's rule (``fewbits/tasks/tood.py``) with the powers and the number of candidates of YOLOv8-like detectors. The task
loss assigns by the student's own answers; distillation by the teacher's (arXiv 2603.05964 v3, section on TPSD).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import DataError
from fewbits.tasks.open_vocabulary.regions import Regions
from fewbits.tasks.tood import Assignment, Predictions, Rules, assign, iou

RULES = Rules(score_power=0.5, overlap_power=6.0, candidates=10)


@torch.no_grad()
def assigned(found: Regions, targets: Tensor) -> tuple[Assignment, Tensor, Tensor]:
    """Return the assignment, and the label int64 [B, points] and the box [B, points, 4] of each point's object.

    targets: [B, M, 5], label (the index of a text) and corners in pixels; label -1 is padding, and also what a point
    without an object gets. A point is within an object's box, at least within half a cell around its middle, so that
    the smallest object has a point. Raises DataError for a label that has no text.
    """
    targets = padded(targets, found.logits.shape[-1])
    labels, corners = targets[..., 0].long(), targets[..., 1:].float()
    boxes, scores = found.boxes.float(), found.logits.float().sigmoid()
    where = Predictions(found.logits, found.boxes, found.points, found.strides)
    chosen = assign(scores, boxes, where, labels, corners, RULES)
    label = torch.where(chosen.share > 0, labels.gather(1, chosen.object), -1)
    return chosen, label, corners.gather(1, chosen.object[..., None].expand(-1, -1, 4))


def positives(found: Regions, targets: Tensor) -> Tensor:
    """Return the text of each positive point, int64 [B, points], -1 where it is none. targets: as in ``assigned``."""
    return assigned(found, targets)[1]


def alignment(scores: Tensor, boxes: Tensor, targets: Tensor, rules: Rules = RULES) -> Tensor:
    """Return how well each query fits each object, score^alpha IoU^beta, [B, M, queries]; 0 in rows of padding.

    scores: [B, queries, T] in 0..1. boxes: corners [B, queries, 4] in the unit of the targets.
    """
    targets = padded(targets, scores.shape[-1])
    labels = targets[..., 0].long()
    score = scores.float().mT.gather(1, labels.clamp(min=0)[..., None].expand(-1, -1, scores.shape[1]))
    overlap = iou(targets[..., 1:].float(), boxes.float())
    return score**rules.score_power * overlap**rules.overlap_power * (labels >= 0)[..., None]


def padded(targets: Tensor, texts: int) -> Tensor:
    """Return targets [B, M, 5] with at least one row. Raises DataError for another shape or a label without a text."""
    if targets.ndim != 3 or targets.shape[-1] != 5:
        raise DataError(f"targets must be [B, M, 5]: label, x1, y1, x2, y2; got {list(targets.shape)}")
    if not targets.shape[1]:
        return targets.new_full((len(targets), 1, 5), -1.0)
    if int(targets[..., 0].max()) >= texts:
        raise DataError(f"label {int(targets[..., 0].max())} has no text: {texts} were given")
    return targets
