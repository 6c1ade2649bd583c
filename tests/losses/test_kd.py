"""Logits distillation is a divergence: zero at the teacher, positive elsewhere, of one size at any temperature."""

from __future__ import annotations

import pytest
import torch

from fewbits.errors import TrainingError
from fewbits.losses import binary_kd, logits_kd


def test_classes_by_their_definition() -> None:
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    assert torch.allclose(logits_kd(student, teacher, temperature=3.0), expected, atol=1e-6)
    maps = [x.reshape(1, 6, 1, 5).permute(0, 3, 2, 1) for x in (student, teacher)]
    assert torch.allclose(logits_kd(*maps, temperature=3.0, axis=1), expected, atol=1e-6)


def test_yes_or_no_is_the_two_class_case_and_weights_choose() -> None:
    student, teacher = torch.randn(4, 7), torch.randn(4, 7)
    both = [torch.stack([x, torch.zeros_like(x)], -1) for x in (student, teacher)]
    assert torch.allclose(binary_kd(student, teacher, temperature=2.0), logits_kd(*both, temperature=2.0), atol=1e-6)
    weight = torch.tensor([1.0, 0.0, 0.5, 0.0])[:, None]
    expected = (binary_kd(student[0], teacher[0]) + binary_kd(student[2], teacher[2]) / 2) / 1.5
    assert torch.allclose(binary_kd(student, teacher, weight=weight), expected, atol=1e-6)
    assert float(binary_kd(student, teacher, weight=torch.zeros(4, 1))) == 0.0


@pytest.mark.parametrize("loss", [logits_kd, binary_kd])
def test_zero_at_the_teacher_which_gets_no_gradient(loss: object) -> None:
    teacher = (torch.randn(3, 4) * 2).requires_grad_()
    student = teacher.detach().clone().requires_grad_()
    assert callable(loss)
    value = loss(student, teacher)
    value.backward()
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-6) and teacher.grad is None
    assert float(loss(student.detach() + torch.randn(3, 4), teacher)) > 1e-3


def test_the_gradient_keeps_its_size_when_softened() -> None:
    student, teacher = torch.randn(8, 5).requires_grad_(), torch.randn(8, 5)
    sizes = [
        float(torch.autograd.grad(logits_kd(student, teacher, temperature=t), student)[0].norm()) for t in (50.0, 100.0)
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(TrainingError, match=r"\[2, 3\], the teacher's \[2, 4\]"):
        logits_kd(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(TrainingError, match="temperature must be above 0 and finite, got 0"):
        binary_kd(torch.zeros(2), torch.zeros(2), temperature=0.0)
