"""Boundary F1: how well the outlines of an answer lie on the right ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.tasks.masks import IGNORE


def outlines(mask: Tensor, classes: Tensor) -> Tensor:
    """Return bool [K, H, W]: the pixels of each of ``classes`` [K] that touch, on one of four sides, another class.

    mask: int64 [H, W]. Neither the border of the image nor pixels that are IGNORE make an outline.
    """
    padded = F.pad(mask[None, None].float(), (1, 1, 1, 1), mode="replicate")[0, 0].long()
    height, width = mask.shape
    edge = torch.zeros_like(mask, dtype=torch.bool)
    for top, left in ((0, 1), (2, 1), (1, 0), (1, 2)):
        other = padded[top : top + height, left : left + width]
        edge |= (other != mask) & (other != IGNORE) & (mask != IGNORE)
    return (mask == classes[:, None, None]) & edge


def boundary_f1(answer: Tensor, mask: Tensor, tolerance: int) -> float:
    """Return the boundary F1 of one image, 0..1, the mean over its classes (Csurka et al. 2013, BMVC).

    answer, mask: int64 [H, W]; where the mask is IGNORE the answer does not count either. Precision is the share of the
    answer's outline that lies within ``tolerance`` pixels (Euclidean) of the right one, recall the share of the right
    one that lies near the answer's. Classes without an outline in both count nowhere; without any, it is NaN.
    """
    answer = answer.where(mask != IGNORE, IGNORE)
    classes = torch.bincount(torch.cat([answer, mask]).flatten())[:IGNORE].nonzero()[:, 0]
    got, want = outlines(answer, classes), outlines(mask, classes)
    there = got.flatten(1).any(1) | want.flatten(1).any(1)
    if not there.any():
        return float("nan")
    precision, recall = _share_near(got, want, tolerance), _share_near(want, got, tolerance)
    return float((2 * precision * recall / (precision + recall).clamp(min=1e-12))[there].mean())


def _share_near(some: Tensor, others: Tensor, tolerance: int) -> Tensor:
    """Return the share of ``some`` [K, H, W] within a distance of ``others``, [K]; zero where there are none."""
    side = torch.arange(-tolerance, tolerance + 1)
    disc = (side[:, None] ** 2 + side[None] ** 2 <= tolerance**2).float()
    near = F.conv2d(others[:, None].float(), disc[None, None], padding=tolerance)[:, 0] > 0.5
    return (some & near).flatten(1).sum(1) / some.flatten(1).sum(1).clamp(min=1)
