"""PKD: the student's feature maps follow the pattern of the teacher's, whatever their scale and level.

"PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient" (Cao et al. 2022, arXiv
2207.02039), eq. 4-5: mimic normalised maps, which is 1 - Pearson's r of each channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import TrainingError

TINY = 1e-6  # added to the standard deviation: a channel may be constant


def pkd(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the sum over levels of half the mean squared difference of the normalised maps, a scalar.

    student, teacher: maps [B, C, H, W] (or [B, C, ...]) of each level; of one level equal in shape. float32 inside. No
    gradient goes to the teacher. Raises TrainingError where levels or shapes differ.
    """
    if not student or len(student) != len(teacher):
        raise TrainingError(
            f"pkd needs the same levels of both models, at least one; got {len(student)} of the student and "
            f"{len(teacher)} of the teacher"
        )
    for level, (mine, theirs) in enumerate(zip(student, teacher)):
        if mine.shape != theirs.shape or mine.ndim < 2:
            raise TrainingError(
                f"level {level}: the student's map has shape {list(mine.shape)}, the teacher's {list(theirs.shape)}; "
                "both must be the same [B, C, ...]: give both models the same batch and tap the same place"
            )
    levels = [0.5 * F.mse_loss(normalised(s), normalised(t.detach())) for s, t in zip(student, teacher)]
    return sum(levels[1:], levels[0])


def normalised(features: Tensor) -> Tensor:
    """Return a map [B, C, ...] with mean 0 and standard deviation 1 (unbiased) of each channel over the batch."""
    rows = features.float().movedim(1, 0).flatten(1)
    spread = rows.std(1, keepdim=True) if rows.shape[1] > 1 else rows.new_zeros(len(rows), 1)
    return (rows - rows.mean(1, keepdim=True)) / (spread + TINY)
