"""Q-ADA: align spatial attention maps of a low-bit student with those of its float teacher (arXiv 2511.05898 v2, 2.4).

An attention map is a distribution over the places of one channel, from how salient a value is and how badly it is
quantized. Plain functions of tensors; where features come from is in ``taps``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import TrainingError
from fewbits.quantizers import Quantizer

CHOICES = {"divergence": ("js", "kl"), "teacher_r": ("student", "zero"), "reduction": ("sum", "mean")}


@dataclass(frozen=True)
class AttentionAlignment:
    """What is aligned how; the paper's symbols in brackets.

    divergence: "js" (bounded by ln 2 a channel; the paper's choice for non-uniform quantizers) or "kl" (for uniform
    ones; about four times as large). teacher_r: the teacher's distortion by the "student"'s quantizer, so that equal
    features cost nothing (reading B), or "zero", as a float model has none (reading A). gamma [gamma]: weight of the
    distortion in a map. kappa [kappa]: added to what is divided by. reduction: over channels. weight: of this loss in
    the total one. Batches and layers are averaged. Raises TrainingError for a value out of range.
    """

    divergence: str = "js"
    teacher_r: str = "student"
    gamma: float = 1.0
    kappa: float = 1e-3
    reduction: str = "sum"
    weight: float = 0.01

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise TrainingError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if any(not 0 <= v < math.inf for v in (self.gamma, self.kappa, self.weight)) or not self.weight:
            raise TrainingError(
                "attention alignment needs gamma and kappa of at least 0 and a weight above 0, all finite, got "
                f"gamma={self.gamma}, kappa={self.kappa}, weight={self.weight}"
            )

    def loss(self, teacher: Tensor, student: Tensor, quantizer: Quantizer) -> Tensor:
        """Return the loss of one layer, without its weight, eq. 13-16.

        teacher, student: features [N, C, ...] before the student's ``quantizer``, of equal shape. Gradients go to the
        student's features, and neither to the teacher, nor to the quantizer: a larger step would be a cheap way out.
        """
        if teacher.shape != student.shape:
            raise TrainingError(
                f"teacher features have shape {list(teacher.shape)}, the student's {list(student.shape)}: give both "
                "the same batch, and tap the same place"
            )
        teacher, student = _wide(teacher.detach()), _wide(student)
        with torch.no_grad():
            spread = step_of(quantizer, student)
            error = (student - quantizer(student)).abs() / (spread + self.kappa)
            other = torch.zeros_like(error)
            if self.teacher_r == "student":
                other = (teacher - quantizer(teacher)).abs() / (spread + self.kappa)
            target = attention(self.scores(teacher, other))
        mine = attention(self.scores(student, error))
        each = DIVERGENCES[self.divergence](target, mine)
        return (each.sum(1) if self.reduction == "sum" else each.mean(1)).mean()

    def scores(self, x: Tensor, error: Tensor) -> Tensor:
        """Return S = log(1 + z^2) + gamma log(1 + r^2), eq. 14-15; error: r, of the shape of x."""
        places = tuple(range(2, x.ndim))
        std, mean = torch.std_mean(x, places, unbiased=False, keepdim=True)
        z = (x - mean) / (std + self.kappa)
        return torch.log1p(z * z) + self.gamma * torch.log1p(error * error)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def step_of(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Return the quantizer's step s_c, to broadcast over x [N, C, ...]; where it has none, the std of each channel."""
    step = quantizer.step()
    if step is None or quantizer.grouping.block is not None:
        return x.detach().std(tuple(range(2, x.ndim)), unbiased=False, keepdim=True)
    return step.to(x).reshape(-1, *[1] * (x.ndim - 2))


def attention(scores: Tensor) -> Tensor:
    """Return sigmoid(scores) [N, C, ...] as distributions over places, [N, C, places]."""
    a = torch.sigmoid(scores).flatten(2)
    return a / a.sum(2, keepdim=True)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of distributions [N, C, places], [N, C]; at most ln 2."""
    middle = ((p + q) / 2).log()
    return ((p * (p.log() - middle)).sum(2) + (q * (q.log() - middle)).sum(2)) / 2


def kullback_leibler(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of distributions [N, C, places], [N, C]."""
    return (p * (p.log() - q.log())).sum(2)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"js": jensen_shannon, "kl": kullback_leibler}
