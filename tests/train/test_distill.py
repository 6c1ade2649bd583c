"""A stage's loss made of distillation terms: those that it names, beside a frozen teacher."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import TrainingError
from fewbits.train import Curriculum, Stage, fit
from fewbits.train.distill import FeatureTerm, distilled

from . import staged as s

WITH_TERMS = Curriculum([Stage(["backbone"], 1 / 3, ["feat"]), Stage(["head"], 2 / 3, ["feat", "logits"])])


def terms(weight: float = 6.0) -> dict[str, FeatureTerm]:
    return {"feat": FeatureTerm(["backbone"], F.mse_loss, weight), "logits": FeatureTerm(["head"], F.mse_loss, 0.5)}


def trained_teacher() -> s.Net:
    teacher = s.float_net()
    fit(teacher, s.batches(), s.cross_entropy, s.config(epochs=3, lr=0.05))
    return teacher.requires_grad_(False).eval()


def gap(student: nn.Module, teacher: nn.Module) -> float:
    """Return the squared distance of the backbones' features, relative to the teacher's, in eval mode."""
    with torch.no_grad():
        pairs = zip(student.eval().backbone(s.Blobs().x), teacher.backbone(s.Blobs().x))  # type: ignore[operator]
        return sum(float(F.mse_loss(a, b) / b.square().mean()) for a, b in pairs)


def test_a_backbone_learns_its_features_from_a_frozen_teacher_in_the_first_stage() -> None:
    teacher = trained_teacher()
    before = {n: t.clone() for n, t in teacher.state_dict().items()}
    found = {}
    for name, curriculum in (("task", s.TWO), ("distilled", WITH_TERMS)):
        student = s.quantized(copy.deepcopy(teacher).requires_grad_(True))
        loss = distilled(student, teacher, terms()) if name == "distilled" else None
        stages = s.staged(dataclasses.replace(curriculum, norms="frozen"), loss)  # as the teacher's are
        fit(student, s.batches(), s.cross_entropy, s.config(epochs=4, lr=0.01), stages=stages)
        found[name] = gap(student, teacher)
    assert found["distilled"] < 0.5 * found["task"]
    assert all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())


def test_the_loss_has_the_terms_of_its_stage_and_the_teacher_runs_as_far_as_they_need() -> None:
    teacher = trained_teacher()
    student = s.calibrated(copy.deepcopy(teacher))
    calls: list[str] = []
    for name in ("backbone", "head"):
        teacher.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    of = distilled(student, teacher, terms())
    batch = s.Blobs().gather(torch.arange(8), None)
    task = s.cross_entropy(student.eval(), batch)
    features = [6 * F.mse_loss(a, b) for a, b in zip(student.backbone(batch[0]), teacher.backbone(batch[0]))]
    logits = 0.5 * F.mse_loss(student(batch[0]), teacher(batch[0]))
    calls.clear()
    first, second = (of(stage, s.cross_entropy)(student, batch) for stage in WITH_TERMS.stages)
    assert calls == ["backbone", "backbone", "head"]
    torch.testing.assert_close(first, task + sum(features))
    torch.testing.assert_close(second, task + sum(features) + logits)
    assert of(Stage(["head"], 1.0), s.cross_entropy) is s.cross_entropy


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        ("grad", "parameter 'head.6.bias' is trained"),
        ("mode", "module 'backbone.first.1' is in training mode"),
        ("shared", "parameter 'backbone.first.0.weight' is trained"),
    ],
)
def test_a_teacher_that_is_not_frozen_is_refused(break_it: str, message: str) -> None:
    student, teacher = s.quantized(), s.float_net().requires_grad_(False).eval()
    if break_it == "grad":
        teacher.head[6].bias.requires_grad_(True)
    elif break_it == "mode":
        teacher.backbone.first[1].train()
    else:
        teacher.backbone = student.requires_grad_(False).eval().backbone
    with pytest.raises(TrainingError, match=f"the teacher is not frozen: its {message}"):
        distilled(student, teacher, terms())


def test_unknown_names_are_refused_before_a_step() -> None:
    student, teacher = s.quantized(), s.float_net().requires_grad_(False).eval()
    steps: list[Any] = []

    def task(model: nn.Module, batch: Any) -> Tensor:
        steps.append(batch)
        return s.cross_entropy(model, batch)

    late = Curriculum([Stage(["backbone"], 0.5), Stage(["head"], 0.5, ["feet"])])
    with pytest.raises(TrainingError, match=r"no distillation term 'feet'; did you mean 'feat'\?; known:"):
        fit(student, s.batches(), task, s.config(), stages=s.staged(late, distilled(student, teacher, terms())))
    wrong = {"feet": FeatureTerm(["bakbone"], F.mse_loss)}
    with pytest.raises(TrainingError, match="no module 'bakbone' to tap; did you mean 'backbone'"):
        fit(student, s.batches(), task, s.config(), stages=s.staged(late, distilled(student, teacher, wrong)))
    with pytest.raises(TrainingError, match="weight of a distillation term"):
        FeatureTerm(["a"], F.mse_loss, 0.0)
    assert not steps
