"""The loss of a stage with distillation terms: features of the student beside those of a frozen teacher.

What a stage is trained on is a function (stage, task loss) -> loss, given to ``Staged``. ``distilled`` makes one of
named terms; a method that compares more than features writes its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import TrainingError, nearest
from fewbits.losses.features import FeatureTaps
from fewbits.train.curriculum import Stage
from fewbits.train.staging import Loss, StageLoss


@dataclass(frozen=True)
class FeatureTerm:
    """weight times the sum, over what the tapped modules return, of loss(student's, teacher's).

    taps: names of modules that both models have. loss: of two tensors of one shape, in float32 at least, to a scalar.
    """

    taps: Sequence[str]
    loss: Callable[[Tensor, Tensor], Tensor]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise TrainingError(f"the weight of a distillation term is above 0 and finite, got {self.weight!r}")


def distilled(
    student: nn.Module,
    teacher: nn.Module,
    terms: Mapping[str, FeatureTerm],
    inputs: Callable[[Any], Any] = itemgetter(0),
) -> StageLoss:
    """Return (stage, task loss) -> task loss plus the terms that the stage names, and no others.

    inputs: what of a batch the models are called on. In each stage the teacher runs as far as that stage's terms need.
    Raises TrainingError for a teacher that is not frozen, and for names of terms and taps that are not there.
    """
    require_frozen(teacher, student)

    def of(stage: Stage, task: Loss) -> Loss:
        for name in stage.distill:
            if name not in terms:
                raise TrainingError(f"no distillation term {name!r}{nearest(name, terms)}; known: {sorted(terms)}")
        chosen = [terms[name] for name in stage.distill]
        if not chosen:
            return task
        taps = FeatureTaps(student, teacher, list(dict.fromkeys(tap for term in chosen for tap in term.taps)))

        def total(model: nn.Module, batch: Any) -> Tensor:
            with taps:
                value = task(model, batch)
                teacher.to(value.device)
                taps.teach(inputs(batch))
            for term in chosen:
                value = value + term.weight * _sum(term, taps)
            return value

        return total

    return of


def _sum(term: FeatureTerm, taps: FeatureTaps) -> Tensor:
    pairs = [(mine, theirs) for name, mine, theirs in taps.pairs() if name in term.taps]
    return torch.stack([term.loss(_wide(mine), _wide(theirs)) for mine, theirs in pairs]).sum()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def require_frozen(teacher: nn.Module, student: nn.Module) -> None:
    """Raise TrainingError unless the teacher is in eval mode, without gradients, and no part of the student."""
    shared = {id(p) for p in student.parameters()}
    learning = [name for name, p in teacher.named_parameters() if p.requires_grad or id(p) in shared]
    training = [name or "(model)" for name, module in teacher.named_modules() if module.training]
    if learning or training:
        what = f"parameter {learning[0]!r} is trained" if learning else f"module {training[0]!r} is in training mode"
        raise TrainingError(
            f"the teacher is not frozen: its {what}; copy the float model before quantize, and call "
            "teacher.requires_grad_(False).eval()"
        )
