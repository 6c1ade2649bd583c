"""Q-ADA: align spatial attention maps of a low-bit student with those of its float teacher (arXiv 2511.05898 v2, 2.4).

An attention map is a distribution over the places of one channel, from how salient a value is and how badly it is
quantized. Plain functions of tensors; where features come from is in ``taps``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewbits.errors import TrainingError
from fewbits.layers.channel_norm import parts
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
            given = quantizer(student), quantizer(teacher) if self.teacher_r == "student" else teacher
        spread = spread.expand(*student.shape[:2], *[1] * (student.ndim - 2))
        flat = (x.flatten(2) for x in (student, teacher, *given, spread))
        each: Tensor = Divergence.apply(*flat, self)
        return (each.sum(1) if self.reduction == "sum" else each.mean(1)).mean()

    def attended(self, x: Tensor, quantized: Tensor, spread: Tensor) -> Attended:
        """Return the attention maps of features [N, C, places] and what their gradient needs; eq. 14-15.

        quantized: the features as quantized; spread: the step, to broadcast.

        The map is sigmoid(S) over its sum, S = log(1 + z^2) + gamma log(1 + r^2), so with o = e^S it is o / (1 + o),
        which takes neither a logarithm nor an exponential where gamma is 1.
        """
        centred = x - x.mean(2, keepdim=True)
        std = (centred * centred).mean(2, keepdim=True).sqrt_()
        z = centred / (std + self.kappa)
        salient = (z * z).add_(1)
        error = (x - quantized).div_(spread + self.kappa).square_().add_(1)
        odds = (error if self.gamma == 1 else error.pow_(self.gamma)).mul_(salient)
        rest = (odds + 1).reciprocal_()
        shares = odds.mul_(rest)
        return Attended(shares.div_(shares.sum(2, keepdim=True)), rest, z, salient, std)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def step_of(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Return the quantizer's step s_c, to broadcast over x [N, C, ...]; where it has none, the std of each channel."""
    step = quantizer.step()
    if step is None or quantizer.grouping.block is not None:
        return x.detach().std(tuple(range(2, x.ndim)), unbiased=False, keepdim=True)
    return step.to(x).reshape(-1, *[1] * (x.ndim - 2))


class Attended(NamedTuple):
    """Attention maps: shares [N, C, places], which sum to 1; rest: 1 - sigmoid(S); z; salient: 1 + z^2; std."""

    shares: Tensor
    rest: Tensor
    z: Tensor
    salient: Tensor
    std: Tensor


class Divergence(torch.autograd.Function):
    """Divergence of the student's attention maps from the teacher's, [N, C], eq. 16, with its gradient in closed form.

    Inputs: features of student and teacher [N, C, places], both as quantized, the step [N, C, 1], and the settings. A
    CPU takes a few images at a time, so that what is worked on stays in the cache; the gradient is found on the way
    forward, and is all that is kept. With P and R the maps, the gradient of S is (R - P) (1 - sigmoid(S)) for
    Kullback-Leibler, and for Jensen-Shannon (l - sum(l R)) R (1 - sigmoid(S)), l = log(R / M) / 2; that of the features
    follows as in an instance norm, through z.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, own: Tensor, other: Tensor, step: Tensor, rules: AttentionAlignment
    ) -> Tensor:
        """Return the divergences."""
        value, gradient = student.new_empty(student.shape[:2]), torch.empty_like(student.detach())
        for x, t, xq, tq, s, v, g in parts(student, teacher, own, other, step, value, gradient):
            mine = rules.attended(x, xq, s)
            v[:], by_scores = DIVERGENCES[rules.divergence](rules.attended(t, tq, s).shares, mine.shares)
            g[:] = _through_z(by_scores.mul_(mine.rest), mine, rules.kappa)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the student's features."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad.unsqueeze(2), None, None, None, None, None


def _through_z(grad: Tensor, mine: Attended, kappa: float) -> Tensor:
    """Return the gradient of the features from that of S = log(1 + z^2) + .., z = (x - mean) / (std + kappa)."""
    grad.mul_(mine.z).mul_(2).div_(mine.salient)
    wide = mine.std + kappa
    along = (grad * mine.z).mean(2, keepdim=True).mul_(wide / mine.std.clamp_min(torch.finfo(grad.dtype).tiny))
    return grad.sub_(grad.mean(2, keepdim=True)).sub_(mine.z * along).div_(wide)


def jensen_shannon(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Jensen-Shannon divergence of distributions [.., places], [..], at most ln 2, and its gradient by the
    logarithms of q's unnormalized shares.
    """
    middle = (p + q) / 2
    mine = (q / middle).log_()
    own = (mine * q).sum(-1, keepdim=True)
    value = ((p * (p / middle).log_()).sum(-1) + own.squeeze(-1)) / 2
    return value, mine.sub_(own).mul_(q).div_(2)


def kullback_leibler(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(p || q) of distributions [.., places], [..], and its gradient by the logarithms of q's unnormalized
    shares.
    """
    return (p * (p / q).log_()).sum(-1), q - p


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "js": jensen_shannon,
    "kl": kullback_leibler,
}
