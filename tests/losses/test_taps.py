"""Taps: the same places of student and teacher, with the quantizer behind each."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbits as fb
from fewbits import LayerPlan, Plan, TensorPlan
from fewbits.errors import TrainingError
from fewbits.layers import balance_fusion, quantized_layers
from fewbits.losses import AttentionAlignment, Taps
from tests.layers.fusion_models import UNet, settled


def models(quantizer: str = "lsq") -> tuple[nn.Module, nn.Module, Tensor]:
    x = torch.randn(4, 3, 16, 16)
    teacher = settled(UNet, x)
    student = copy.deepcopy(teacher)
    balance_fusion(student, x)
    plan = Plan((("*", LayerPlan(TensorPlan(3, granularity="channel"), TensorPlan(3, quantizer))),))
    fb.calibrate(fb.quantize(student, plan, verbose=False), [x])
    return student, teacher, x


@pytest.mark.parametrize("quantizer", ["lsq", "pact", "n2uq", "denoise"])
def test_training_with_alignment_brings_the_maps_together(quantizer: str) -> None:
    student, teacher, x = models(quantizer)
    ada, losses = AttentionAlignment(weight=1.0), []
    frozen = {n: p.clone() for n, p in teacher.named_parameters()}
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    for _ in range(12):
        with Taps(student.train(), teacher, ["up0", "head"]) as taps:
            student(x)
            taps.teach(x)
            loss = taps.loss(ada)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, frozen[n]) and p.grad is None for n, p in teacher.named_parameters())


def test_what_is_tapped() -> None:
    student, teacher, x = models()
    layers = quantized_layers(student)
    with Taps(student, teacher, ["up0", "up0.0", "down1"]) as taps:
        student(x)
        taps.teach(x)
    output, inputs, shared = taps.features()
    assert output[1].shape == (4, 8, 16, 16) and output[2] is layers["head"].input_quantizer
    assert inputs[1].shape == (4, 20, 16, 16) and inputs[2] is layers["up0.0"].input_quantizer
    assert shared[2] is layers["down2.0"].input_quantizer  # a concat takes it in, too
    assert torch.equal(output[0], teacher.get_submodule("up0")(inputs[0]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*student.modules(), *teacher.modules()])
    assert not teacher.training and not output[0].requires_grad


def test_the_ratio_of_gradients_at_the_taps() -> None:
    student, teacher, x = models()
    with Taps(student, teacher, ["up0"]) as taps:
        out = student(x)
        taps.teach(x)
        loss, task = taps.loss(AttentionAlignment()), F.mse_loss(out, torch.zeros_like(out))
        ratio = taps.gradient_ratio(loss, task)
    assert ratio > 0 and taps.gradient_ratio(3 * loss, task) == pytest.approx(3 * ratio, rel=1e-4)
    (loss + task).backward()


def test_a_teacher_of_another_architecture() -> None:
    student, teacher, _ = models()
    with pytest.raises(TrainingError, match=r"its 'head.weight' is \[7, 8, 1, 1\], the student's \[5, 8, 1, 1\]"):
        Taps(student, UNet(classes=7), ["up0"])
    teacher.up1.append(nn.Conv2d(12, 12, 1))  # type: ignore[operator, union-attr]
    with pytest.raises(TrainingError, match=r"its 'up1.3.weight' \[12, 12, 1, 1\] is not in the student"):
        Taps(student, teacher, ["up0"])


def test_other_refusals() -> None:
    student, teacher, x = models()
    with pytest.raises(TrainingError, match=r"no module 'up2' to tap; did you mean"):
        Taps(student, teacher, ["up2"])
    with pytest.raises(TrainingError, match="no modules to tap"):
        Taps(student, teacher, [])
    with Taps(student, teacher, ["up0"]) as taps:
        student(x)
    with pytest.raises(TrainingError, match=r"tap 'up0' ran 1 times in the student and 0 times in the teacher"):
        taps.loss(AttentionAlignment())
    with Taps(student, teacher, ["up1"]) as taps:  # resized before the next layer
        student(x)
        taps.teach(x)
    with pytest.raises(TrainingError, match="no layer with an input quantizer takes in what 'up1' returns"):
        taps.loss(AttentionAlignment())
