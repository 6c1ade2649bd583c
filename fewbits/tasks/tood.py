"""Task-aligned assignment and loss of one-stage detectors.

"TOOD: Task-aligned One-stage Object Detection" (Feng et al. 2021, arXiv 2108.07755), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GAMMA = 2.0  # focus on what is learned badly, eq. 6
BOX_WEIGHT = 2.0  # of the boxes' loss against the classes'
TINY = 1e-9


@dataclass(frozen=True)
class Rules:
    """How points are chosen; the defaults are the paper's.

    score_power, overlap_power: alpha and beta of the alignment s^alpha u^beta, eq. 4. candidates: points that an object
    may take, section 3.2.1.
    """

    score_power: float = 1.0
    overlap_power: float = 6.0
    candidates: int = 13


PAPER = Rules()


@dataclass(frozen=True)
class Predictions:
    """logits: [B, points, classes]. boxes: corners in pixels [B, points, 4]. points: x, y [points, 2]; strides:
    [points], both in pixels."""

    logits: Tensor
    boxes: Tensor
    points: Tensor
    strides: Tensor


@dataclass(frozen=True)
class Assignment:
    """What each point is to find, [B, points].

    object: index of the object, int64; 0 where it finds none. weight: the normalised alignment; 0 where it finds none.
    share: the same before it is brought to the object's largest IoU: 1 at the best point of each object.
    """

    object: Tensor
    weight: Tensor
    share: Tensor


def tood_loss(found: Predictions, targets: Tensor) -> Tensor:
    """Return the loss of classes and boxes, a scalar. targets: [B, M, 5]; see ``DetectionExamples.gather``.

    Eq. 6 and 7: classes by binary cross entropy to the alignment, with a focal weight; boxes by GIoU; each over the sum
    of its weights, and at least over 1: there may be no object at all. Unlike the paper's, boxes are weighted by their
    share: else an object whose box is still far off, such as a small one among many large, is hardly ever fitted.
    """
    from torchvision.ops import generalized_box_iou_loss

    if not targets.shape[1]:
        targets = targets.new_full((len(targets), 1, 5), -1.0)  # nothing to find: one row of padding
    logits, boxes = found.logits.float(), found.boxes.float()
    labels, corners = targets[..., 0].long(), targets[..., 1:]
    with torch.no_grad():
        aligned = assign(logits.sigmoid(), boxes, found, labels, corners)
        kind = labels.clamp(min=0).gather(1, aligned.object)
        wanted = F.one_hot(kind, logits.shape[-1]) * aligned.weight[..., None]
    focus = (wanted - logits.sigmoid()).abs() ** GAMMA
    classes = (focus * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")).sum()
    classes = classes / aligned.weight.sum().clamp(min=1.0)
    positive = aligned.weight > 0
    truth = corners.gather(1, aligned.object[..., None].expand(-1, -1, 4))
    apart = generalized_box_iou_loss(boxes[positive], truth[positive], reduction="none")
    share = aligned.share[positive]
    loss: Tensor = classes + BOX_WEIGHT * (share * apart).sum() / share.sum().clamp(min=1.0)
    return loss


def assign(
    scores: Tensor, boxes: Tensor, found: Predictions, labels: Tensor, corners: Tensor, rules: Rules = PAPER
) -> Assignment:
    """Choose for each object the points inside of it that are best aligned, eq. 4; a point finds one object at most.

    scores: [B, points, C] in 0..1. labels: int64 [B, M], -1 where there is no object. corners: [B, M, 4].
    """
    real = labels >= 0
    overlap = iou(corners, boxes)  # [B, M, points]
    score = scores.mT.gather(1, labels.clamp(min=0)[..., None].expand(-1, -1, scores.shape[1]))
    # as logarithms: u^6 of the first boxes has no digits left in float32
    aligned = rules.score_power * (score + TINY).log() + rules.overlap_power * (overlap + TINY).log()
    allowed = inside(found, corners) & real[..., None]
    aligned = aligned.masked_fill(~allowed, -torch.inf)
    best = aligned.topk(min(rules.candidates, aligned.shape[-1]), -1).indices
    chosen = torch.zeros_like(allowed).scatter_(-1, best, True) & allowed
    first = overlap.masked_fill(~chosen, -1.0).argmax(1, keepdim=True)  # [B, 1, points]
    chosen &= torch.zeros_like(chosen).scatter_(1, first, True)
    aligned = aligned.masked_fill(~chosen, -torch.inf)
    most = aligned.amax(-1, keepdim=True).clamp(min=-1e9)  # of objects without a point it is minus infinity
    reached = overlap.masked_fill(~chosen, 0.0).amax(-1, keepdim=True)
    share = (aligned - most).exp()
    weight = share * reached  # the largest of an object is its largest IoU, section 3.2.2
    return Assignment(first[:, 0], weight.sum(1), share.sum(1))


def inside(found: Predictions, corners: Tensor) -> Tensor:
    """Tell which points are inside of which boxes, bool [B, M, points]; a box is at least as wide as a cell, so that
    the smallest object has a point. corners: [B, M, 4]."""
    middle = (corners[..., :2] + corners[..., 2:]) / 2
    half = ((corners[..., 2:] - corners[..., :2]) / 2).clamp(min=float(found.strides.min()) / 2)
    return ((found.points - middle[:, :, None]).abs() <= half[:, :, None]).all(-1)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the intersection over union of all pairs, [B, M, N], of corners [B, M, 4] and [B, N, 4]."""
    low = torch.maximum(first[:, :, None, :2], second[:, None, :, :2])
    high = torch.minimum(first[:, :, None, 2:], second[:, None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    areas = [(b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1) for b in (first, second)]
    return common / (areas[0][:, :, None] + areas[1][:, None] - common + TINY)
