"""Task loss of the open-vocabulary detector: which text a point shows, and the box around it.

Binary cross entropy to task-aligned soft targets (TOOD, arXiv 2108.07755); CIoU (Zheng et al. 2020, arXiv 1911.08287);
distribution focal loss of the sides (Li et al. 2020, arXiv 2006.04388, eq. 6). Weights are those of YOLOv8-like
detectors, as arXiv 2603.05964 keeps them, without the factor of the batch size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.tasks.open_vocabulary.assign import assigned
from fewbits.tasks.open_vocabulary.regions import SIDE_BINS, Regions

CLASS_WEIGHT, BOX_WEIGHT, SIDE_WEIGHT = 0.5, 7.5, 1.5
FARTHEST = SIDE_BINS - 1 - 0.01  # strides to a side, so that there is always a bin above


@dataclass(frozen=True)
class TaskLoss:
    """Weighted parts of the loss, scalars: classes, boxes (CIoU), sides (their distributions)."""

    classes: Tensor
    boxes: Tensor
    sides: Tensor

    @property
    def total(self) -> Tensor:
        """Return their sum."""
        return self.classes + self.boxes + self.sides


def detection_loss(found: Regions, targets: Tensor) -> TaskLoss:
    """Return the loss of the student's answer, by its own assignment, in float32.

    targets: [B, M, 5]; see ``assigned``, also for errors. Each part is over the sum of the soft targets, and at least
    over 1: there may be no object at all.
    """
    from torchvision.ops import complete_box_iou_loss

    aligned, label, corners = assigned(found, targets)
    wanted = F.one_hot(label.clamp(min=0), found.logits.shape[-1]) * aligned.weight[..., None]
    total = aligned.weight.sum().clamp(min=1.0)
    classes = F.binary_cross_entropy_with_logits(found.logits.float(), wanted, reduction="sum")
    positive = aligned.weight > 0
    weight, truth = aligned.weight[positive], corners[positive]
    apart = complete_box_iou_loss(found.boxes.float()[positive], truth, reduction="none")
    image, point = positive.nonzero(as_tuple=True)
    wide = distances(truth, found.points[point], found.strides[point])
    spread = side_loss(found.sides[image, point], wide)
    return TaskLoss(
        CLASS_WEIGHT * classes / total,
        BOX_WEIGHT * (weight * apart).sum() / total,
        SIDE_WEIGHT * (weight * spread).sum() / total,
    )


def distances(corners: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Return the distances of left, top, right and bottom from points inside, in strides, [N, 4], 0..``FARTHEST``."""
    ahead = torch.cat([points - corners[:, :2], corners[:, 2:] - points], -1)
    return (ahead / strides[:, None]).clamp(0, FARTHEST)


def side_loss(sides: Tensor, wanted: Tensor) -> Tensor:
    """Return the distribution focal loss of each point, [N], the mean over its sides.

    Cross entropy to the two bins next to the distance, by how near each is. sides: logits [N, 4, bins]; wanted: [N, 4]
    in 0..bins - 1, without the last.
    """
    shares, below = sides.float().log_softmax(-1), wanted.long()[..., None]
    above_share = wanted - below[..., 0]
    lower, upper = shares.gather(-1, below)[..., 0], shares.gather(-1, below + 1)[..., 0]
    return -((1 - above_share) * lower + above_share * upper).mean(-1)
