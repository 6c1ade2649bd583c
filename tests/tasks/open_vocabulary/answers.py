"""Answers of detectors that never ran, for tests of losses and measures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.tasks.detector import grid
from fewbits.tasks.open_vocabulary.regions import SIDE_BINS, Regions

TARGETS = torch.tensor(
    [
        [[1.0, 4.0, 4.0, 60.0, 60.0], [3.0, 30.0, 2.0, 62.0, 40.0], [1.0, 8.0, 40.0, 20.0, 50.0]],
        [[-1.0, 0.0, 0.0, 0.0, 0.0]] * 3,
        [[4.0, 9.0, 9.0, 11.0, 11.0], [0.0, 0.0, 0.0, 64.0, 64.0], [-1.0, 0.0, 0.0, 0.0, 0.0]],
    ]
)  # three images of 64 x 64: three objects, none, two of which one is tiny


def answer(seed: int, images: int = 3, texts: int = 5, width: int = 16) -> Regions:
    """Return an answer by chance for images of 64 x 64: 84 points, boxes as the sides' distributions say."""
    generator = torch.Generator().manual_seed(seed)
    points, strides = grid([(8, 8), (4, 4), (2, 2)], torch.device("cpu"))
    embeddings = torch.randn(images, len(points), width, generator=generator)
    t = F.normalize(torch.randn(texts, width, generator=torch.Generator().manual_seed(99)), dim=-1)
    sides = torch.randn(images, len(points), 4, SIDE_BINS, generator=generator)
    features = tuple(torch.randn(images, 4, s, s, generator=generator) for s in (8, 4, 2))
    logits = 3 * F.normalize(embeddings, dim=-1) @ t.T
    return Regions(embeddings, t, logits, boxes_of(sides, points, strides), sides, points, strides, features)


def boxes_of(sides: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Return the corners that the distributions of the sides mean."""
    far = sides.softmax(-1) @ torch.arange(float(SIDE_BINS)) * strides[:, None]
    return torch.cat([points - far[..., :2], points + far[..., 2:]], -1)


def with_sides(found: Regions, sides: Tensor) -> Regions:
    """Return the answer with other sides, and the boxes that follow."""
    return found._replace(sides=sides, boxes=boxes_of(sides, found.points, found.strides))
