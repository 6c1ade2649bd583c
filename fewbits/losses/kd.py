"""Logits distillation: the student answers as its teacher does, softened by a temperature.

"Distilling the Knowledge in a Neural Network" (Hinton et al. 2015, arXiv 1503.02531), section 2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import TrainingError


def logits_kd(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, axis: int = -1) -> Tensor:
    """Return temperature^2 * KL(teacher || student) of the softened classes, a scalar: the mean over all else.

    student, teacher: logits of equal shape, classes along ``axis`` (segmentation: 1). The square keeps the gradient's
    size when the temperature changes. In float32; no gradient goes to the teacher. Raises TrainingError for shapes that
    differ and a temperature that is not above 0.
    """
    _check(student, teacher, temperature)
    mine = (student.float() / temperature).log_softmax(axis)
    theirs = (teacher.detach().float() / temperature).log_softmax(axis)
    apart = F.kl_div(mine, theirs, reduction="none", log_target=True).sum(axis)
    return temperature**2 * apart.mean()


def binary_kd(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, weight: Tensor | None = None) -> Tensor:
    """Return temperature^2 * KL(teacher || student) of independent yes-or-no answers, a scalar: their mean.

    For detectors, whose classes do not exclude each other. student, teacher: logits of equal shape. weight: of each
    answer, to broadcast; the mean is then over the weights' sum. Gradients and errors are as in ``logits_kd``.
    """
    _check(student, teacher, temperature)
    mine, theirs = student.float() / temperature, teacher.detach().float() / temperature
    # cross entropy less the teacher's own entropy, so that equal logits cost nothing
    apart = _cross_entropy(mine, theirs) - _cross_entropy(theirs, theirs)
    if weight is None:
        return temperature**2 * apart.mean()
    spread = weight.float().expand_as(apart)
    return temperature**2 * (apart * spread).sum() / spread.sum().clamp(min=torch.finfo(torch.float32).tiny)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target.sigmoid(), reduction="none")


def _check(student: Tensor, teacher: Tensor, temperature: float) -> None:
    if student.shape != teacher.shape:
        raise TrainingError(
            f"the student's logits are {list(student.shape)}, the teacher's {list(teacher.shape)}: both must answer "
            "the same batch for the same classes"
        )
    if not 0 < temperature < math.inf:
        raise TrainingError(f"temperature must be above 0 and finite, got {temperature}")
