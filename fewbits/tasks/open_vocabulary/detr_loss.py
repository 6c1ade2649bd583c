"""Task loss of detectors with queries: each object is matched with one query of every layer.

Matching: Carion et al. 2020 (DETR, arXiv 2005.12872), section 3.1, with the focal cost of Deformable DETR. Classes:
varifocal loss (Zhang et al. 2021, arXiv 2008.13367, eq. 2), as in RT-DETR (arXiv 2304.08069), without denoising.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import TrainingError
from fewbits.tasks.open_vocabulary.assign import padded
from fewbits.tasks.open_vocabulary.queries import Queries, centred

CLASS_COST, L1_COST, IOU_COST = 2.0, 5.0, 2.0
CLASS_WEIGHT, L1_WEIGHT, IOU_WEIGHT = 1.0, 5.0, 2.0
BALANCE, GAMMA = 0.75, 2.0  # of what no object is matched with, in the varifocal loss
FOCAL_BALANCE = 0.25  # of the cost
TINY = 1e-8

Match = tuple[Tensor, Tensor, Tensor]  # image, query and object of each pair, int64 [P]


def detr_loss(found: Queries, targets: Tensor) -> Tensor:
    """Return the sum over layers of class, L1 and GIoU losses, a scalar, each over the number of objects (at least 1).

    targets: [B, M, 5], label (index of a text) and corners in pixels; label -1 is padding. In float32. Raises DataError
    for a label without a text, TrainingError for an answer that is not finite.
    """
    targets = padded(targets, found.logits.shape[-1])
    losses = [layer_loss(logits, boxes, targets, found.size) for logits, boxes in found.layers]
    return torch.stack(losses).sum()


def layer_loss(logits: Tensor, boxes: Tensor, targets: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the loss of one layer, in float32. logits: [B, Q, T]; boxes: corners in pixels [B, Q, 4]; size: width and
    height."""
    from torchvision.ops import box_iou, generalized_box_iou_loss

    logits, boxes = logits.float(), boxes.float()
    image, query, thing = match(logits, boxes, targets, size)
    count = max(1, int((targets[..., 0] >= 0).sum()))
    mine, truth = boxes[image, query], targets[image, thing, 1:].float()
    wanted = torch.zeros_like(logits)
    with torch.no_grad():
        overlap = box_iou(mine, truth).diagonal()
    wanted[image, query, targets[image, thing, 0].long()] = overlap
    there = torch.zeros_like(logits, dtype=torch.bool)
    there[image, query, targets[image, thing, 0].long()] = True
    weight = torch.where(there, wanted, BALANCE * logits.detach().sigmoid() ** GAMMA)
    classes = F.binary_cross_entropy_with_logits(logits, wanted, weight, reduction="sum")
    far = (centred(mine, size) - centred(truth, size)).abs().sum()
    apart = generalized_box_iou_loss(mine, truth, reduction="sum")
    loss: Tensor = (CLASS_WEIGHT * classes + L1_WEIGHT * far + IOU_WEIGHT * apart) / count
    return loss


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: Tensor, size: tuple[int, int]) -> Match:
    """Return the pairs of query and object, each once, that cost least together; of the most that there can be."""
    from scipy.optimize import linear_sum_assignment

    found: list[tuple[int, int, int]] = []
    for image, rows in enumerate(targets):
        real = (rows[:, 0] >= 0).nonzero().flatten()
        costs = cost(logits[image], boxes[image], rows[real], size)
        if not costs.isfinite().all():
            raise TrainingError("the answer has logits or boxes that are not finite: lower the learning rate")
        queries, things = linear_sum_assignment(costs.cpu().numpy())
        found += [(image, int(q), int(real[o])) for q, o in zip(queries, things)]
    image_index, query, thing = torch.tensor(found, dtype=torch.int64, device=logits.device).reshape(-1, 3).T
    return image_index, query, thing


def cost(logits: Tensor, boxes: Tensor, rows: Tensor, size: tuple[int, int]) -> Tensor:
    """Return what it costs to match each query with each object of one image, [Q, N]; rows: [N, 5]."""
    from torchvision.ops import generalized_box_iou

    score = logits.sigmoid()[:, rows[:, 0].long()]
    missed = FOCAL_BALANCE * (1 - score) ** GAMMA * -(score + TINY).log()
    invented = (1 - FOCAL_BALANCE) * score**GAMMA * -(1 - score + TINY).log()
    truth = rows[:, 1:].float()
    far = torch.cdist(centred(boxes, size), centred(truth, size), p=1)
    total: Tensor = CLASS_COST * (missed - invented) + L1_COST * far - IOU_COST * generalized_box_iou(boxes, truth)
    return total
