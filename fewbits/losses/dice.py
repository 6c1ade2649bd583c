"""The soft Dice loss of segmentation (Milletari et al. 2016, arXiv 1606.04797), over several classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTH = 1.0  # pixels that are added to both sides of the fraction, so that no class divides by zero


def soft_dice(logits: Tensor, target: Tensor, *, ignore: int | None = None, ground: int | None = None) -> Tensor:
    """Return 1 - mean over classes of 2 sum(p t) / (sum(p) + sum(t)), a scalar in 0..1.

    p: softmax of the logits [B, K, ...] over axis 1, in float32; t: one-hot of the target int64 [B, ...]; the sums run
    over the whole batch. Left out are pixels of the value ``ignore``, the class ``ground``, and classes that the target
    does not have: of these only false answers could be told. Zero where no class is left.
    """
    classes = logits.shape[1]
    valid = torch.ones_like(target, dtype=torch.bool) if ignore is None else target != ignore
    right = F.one_hot(target.where(valid, 0), classes).movedim(-1, 1) * valid[:, None]
    share = logits.float().softmax(1) * valid[:, None]
    axes = [0, *range(2, logits.ndim)]
    both, total, there = (share * right).sum(axes), (share + right).sum(axes), right.sum(axes)
    counts = there > 0
    if ground is not None:
        counts &= torch.arange(classes, device=logits.device) != ground
    dice = (2 * both + SMOOTH) / (total + SMOOTH)
    return ((1 - dice) * counts).sum() / counts.sum().clamp(min=1)
