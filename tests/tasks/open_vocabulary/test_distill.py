"""What a stage of an open-vocabulary detector is trained on: its terms and no others, with no more of the teacher."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.errors import TrainingError
from fewbits.losses import pkd
from fewbits.tasks.open_vocabulary.detector import OpenVocabularyDetector
from fewbits.tasks.open_vocabulary.distill import Weights, regions, task_loss, text_anchored
from fewbits.tasks.open_vocabulary.loss import detection_loss
from fewbits.tasks.open_vocabulary.relations import distillation
from fewbits.tasks.open_vocabulary.text import ComposedText
from fewbits.tasks.open_vocabulary.vocabulary import Vocabulary
from fewbits.train import Stage
from tests.tasks.open_vocabulary.made import tiny_detector, vocabulary

TARGETS = torch.tensor([[[0.0, 4, 4, 40, 30], [1, 20, 30, 60, 60]], [[1, 8, 0, 30, 60], [-1.0, 0, 0, 0, 0]]])
WEIGHTS = Weights(features=2.0, relations=3.0, beta=0.5)


def pair() -> tuple[OpenVocabularyDetector, OpenVocabularyDetector, Tensor]:
    student = tiny_detector("cat", "a dog")
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    for p in teacher.parameters():
        p += 0.05 * torch.randn_like(p)
    return student, teacher, torch.randn(2, 3, 64, 64)


def loss_of(student: Any, teacher: Any, terms: Sequence[str], batch: Any) -> Tensor:
    return text_anchored(student, teacher, WEIGHTS)(Stage([""], 1.0, terms), task_loss)(student, batch)


@pytest.mark.parametrize("name", ["tpsd", "region-text", "region-region"])
def test_the_loss_has_the_terms_of_its_stage(name: str) -> None:
    student, teacher, x = pair()
    found, told = regions(student, x), regions(teacher, x)
    task = detection_loss(found, TARGETS).total
    features = 2 * pkd(found.features, told.features)
    variant = "full" if name == "tpsd" else name
    relations = 3 * distillation(found, told, TARGETS, variant=variant, beta=0.5)
    assert features.item() > 0.01 and relations.item() > 1e-4
    torch.testing.assert_close(loss_of(student, teacher, ["feat"], (x, TARGETS)), task + features)
    torch.testing.assert_close(loss_of(student, teacher, [name], (x, TARGETS)), task + relations)
    torch.testing.assert_close(loss_of(student, teacher, ["feat", name], (x, TARGETS)), task + features + relations)


def test_the_teacher_runs_no_further_than_a_stage_needs() -> None:
    student, teacher, x = pair()
    ran: list[str] = []
    for name, module in teacher.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    loss_of(student, teacher, ["feat"], (x, TARGETS))
    assert ran == ["backbone"]
    loss_of(student, teacher, ["feat", "tpsd"], (x, TARGETS))
    assert ran[1:3] == ["backbone", "neck"]


def test_a_stage_without_terms_has_the_loss_that_fit_was_given() -> None:
    def mine(model: nn.Module, batch: Any) -> Tensor:
        return torch.zeros(())

    student, teacher, _ = pair()
    assert text_anchored(student, teacher)(Stage([""], 1.0), mine) is mine


def test_images_without_objects_are_trained_on_too() -> None:
    student, teacher, x = pair()
    loss = loss_of(student.train(), teacher, ["feat", "tpsd"], (x, TARGETS[:, :0]))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in student.parameters())


def test_what_cannot_be_distilled_is_told() -> None:
    student, teacher, _ = pair()
    with pytest.raises(TrainingError, match="no distillation term 'feats'; did you mean 'feat'"):
        text_anchored(student, teacher)(Stage([""], 1.0, ["feats"]), task_loss)
    with pytest.raises(TrainingError, match="the teacher is not frozen"):
        text_anchored(student, copy.deepcopy(student).train())
    for others in (vocabulary("cat", "a bird"), Vocabulary.of(ComposedText(32, seed=1), ["cat", "a dog"])):
        teacher.set_vocabulary(others)
        with pytest.raises(TrainingError, match="look for different texts: give both one vocabulary"):
            text_anchored(student, teacher)
    with pytest.raises(TrainingError, match="relations of distillation is above 0 and finite, got 0"):
        Weights(relations=0)
