"""What an open-vocabulary detector says of a batch, as its losses and its distillation take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

SIDE_BINS = 16  # bins of the distribution of each side's distance: 0..15 strides


class Regions(NamedTuple):
    """What the detector says of each point, and what of it the losses need.

    embeddings: v, [B, points, D], as the last 1x1 convolution of the class branch returns them, not normalised. texts:
    t, [T, D], of unit length. logits: [B, points, T], scaled and shifted cosines of the two. boxes: corners x1, y1, x2,
    y2 in pixels [B, points, 4]. sides: logits of the distances of left, top, right, bottom, [B, points, 4,
    ``SIDE_BINS``]. points: x, y in pixels [points, 2]; strides: [points]. features: the backbone's, at strides 8, 16
    and 32. A tuple, so that wrappers in training find the tensors.
    """

    embeddings: Tensor
    texts: Tensor
    logits: Tensor
    boxes: Tensor
    sides: Tensor
    points: Tensor
    strides: Tensor
    features: tuple[Tensor, ...]
