"""Attention alignment: the divergence of maps, what it is blind to, and where its gradients go."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits.errors import TrainingError
from fewbits.layers import channel_norm
from fewbits.losses import AttentionAlignment
from fewbits.losses.ada import jensen_shannon, kullback_leibler, step_of
from fewbits.plan import TensorPlan
from fewbits.quantizers import Quantizer, make_quantizer

QUANTIZERS = ["lsq", "ste", "pact", "n2uq", "denoise", "lsq+"]


def quantizer(name: str = "lsq", bits: int = 4, **given: Any) -> Quantizer:
    made = make_quantizer(TensorPlan(bits, name, symmetric=name != "lsq+", **given), channels=6, axis=-3)
    made.calibrate(features())
    return made


def features(seed: int = 1, channels: int = 6) -> Tensor:
    return torch.randn(3, channels, 7, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("divergence", ["js", "kl"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_equal_features_cost_nothing_and_others_something_bounded(name: str, divergence: str) -> None:
    q, x, y = quantizer(name), features(), features(2)
    ada = AttentionAlignment(divergence)
    assert abs(float(ada.loss(x, x.clone(), q))) < 1e-5
    loss = float(ada.loss(x, y, q))
    assert 0 < loss < (6 * math.log(2) if divergence == "js" else math.inf)


def test_a_teacher_without_distortion_leaves_a_floor() -> None:
    q, x = quantizer(bits=2), features()
    assert float(AttentionAlignment(teacher_r="zero").loss(x, x.clone(), q)) > 1e-4
    assert abs(float(AttentionAlignment(teacher_r="zero", gamma=0.0).loss(x, x.clone(), q))) < 1e-6


def test_reduction_is_over_channels_and_batches_are_averaged() -> None:
    q, x, y = quantizer(), features(), features(2)
    total = AttentionAlignment().loss(x, y, q)
    torch.testing.assert_close(AttentionAlignment(reduction="mean").loss(x, y, q), total / 6)
    twice = AttentionAlignment().loss(torch.cat([x, x]), torch.cat([y, y]), q)
    torch.testing.assert_close(twice, total)


def test_saliency_alone_does_not_see_an_affine_map_of_a_channel() -> None:
    q, x, y = quantizer(), features(), features(2)
    ada = AttentionAlignment(gamma=0.0, kappa=0.0)
    gain, shift = torch.rand(6, 1, 1) + 0.5, torch.randn(6, 1, 1)
    torch.testing.assert_close(ada.loss(x * gain + shift, y * gain + shift, q), ada.loss(x, y, q))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_gradients_go_to_the_students_features_only(name: str) -> None:
    q, teacher, student = quantizer(name), features().requires_grad_(), features(2).requires_grad_()
    AttentionAlignment().loss(teacher, student, q).backward()
    assert teacher.grad is None and all(p.grad is None for p in q.parameters())
    assert student.grad is not None and float(student.grad.abs().max()) > 0


def test_a_larger_error_at_one_place_raises_attention_there() -> None:
    ada, x, step = AttentionAlignment(), features().flatten(2), torch.ones(3, 6, 1)
    before = ada.attended(x, x, step).shares
    quantized = x.clone()
    quantized[1, 2, 28] += 2.0
    after = ada.attended(x, quantized, step).shares
    assert float(after[1, 2, 28]) > float(before[1, 2, 28])
    others = [i for i in range(56) if i != 28]
    assert bool((after[1, 2, others] < before[1, 2, others]).all())
    torch.testing.assert_close(after.sum(2), torch.ones(3, 6))


def by_definition(ada: AttentionAlignment, teacher: Tensor, student: Tensor, q: Quantizer) -> Tensor:
    """The loss as eq. 13-16 write it, its gradient by autograd."""
    step = step_of(q, student)

    def shares(x: Tensor, error: Tensor) -> Tensor:
        z = (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), unbiased=False, keepdim=True) + ada.kappa)
        r = error.detach() / (step + ada.kappa)
        a = torch.sigmoid(torch.log1p(z**2) + ada.gamma * torch.log1p(r**2)).flatten(2)
        return a / a.sum(2, keepdim=True)

    other = teacher - q(teacher) if ada.teacher_r == "student" else torch.zeros_like(teacher)
    p, r = shares(teacher, other).detach(), shares(student, student - q(student))
    middle = (p + r) / 2
    kl = (p * (p / r).log()).sum(2)
    js = ((p * (p / middle).log()).sum(2) + (r * (r / middle).log()).sum(2)) / 2
    each = kl if ada.divergence == "kl" else js
    return (each.sum(1) if ada.reduction == "sum" else each.mean(1)).mean()


@pytest.mark.parametrize("part", [1, 1 << 18])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("teacher_r", ["student", "zero"])
@pytest.mark.parametrize("divergence", ["js", "kl"])
def test_loss_and_gradient_are_those_of_the_definition(
    divergence: str, teacher_r: str, gamma: float, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_norm, "PART", part)
    ada = AttentionAlignment(divergence, teacher_r, gamma)
    for q in (quantizer(), quantizer(granularity="channel"), quantizer("denoise")):
        teacher, student = features().double(), features(2).double()
        found = []
        for loss in (ada.loss, lambda *given: by_definition(ada, *given)):
            x = student.clone().requires_grad_()
            value = loss(teacher, x, q.double())
            value.backward()  # type: ignore[no-untyped-call]
            found.append((value.detach(), x.grad))
        torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-12)


def test_a_channel_of_one_value_has_a_finite_gradient() -> None:
    q, x = quantizer(), features(2)
    x[:, 1] = 0.25
    x.requires_grad_()
    AttentionAlignment("kl").loss(features(), x, q).backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_divergences_against_their_definition() -> None:
    p, q = (torch.softmax(torch.randn(2, 3, 9, dtype=torch.float64), 2) for _ in range(2))
    torch.testing.assert_close(
        kullback_leibler(p, q)[0], torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(2)
    )
    middle = (p + q) / 2
    half = (kullback_leibler(p, middle)[0] + kullback_leibler(q, middle)[0]) / 2
    torch.testing.assert_close(jensen_shannon(p, q)[0], half)
    apart, _ = jensen_shannon(torch.tensor([[[1 - 1e-9, 1e-9]]]), torch.tensor([[[1e-9, 1 - 1e-9]]]))
    assert float(apart) == pytest.approx(math.log(2), rel=1e-4)


def test_the_step_of_each_quantizer() -> None:
    x = features()
    for name in ("lsq", "ste", "lsq+"):
        q = quantizer(name)
        assert step_of(q, x).shape == (1, 1, 1) and float(step_of(q, x)) == pytest.approx(float(q.affine()[0].detach()))  # type: ignore
    pact = quantizer("pact")
    assert float(step_of(pact, x)) == pytest.approx(float(pact.clip.detach()) / 7)  # type: ignore[arg-type]
    odd = quantizer("lsq", 2, options={"odd": True})
    assert float(step_of(odd, x)) == pytest.approx(2 * float(odd.scale.detach()))  # type: ignore[arg-type]
    channels = quantizer("lsq", granularity="channel")
    assert step_of(channels, x).shape == (6, 1, 1)
    torch.testing.assert_close(step_of(quantizer("denoise"), x), x.std((2, 3), unbiased=False, keepdim=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"divergence": "l2"}, "divergence must be one of"),
        ({"teacher_r": "a"}, "teacher_r must be one of"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"gamma": -1.0}, "gamma and kappa of at least 0"),
        ({"weight": 0.0}, "a weight above 0"),
        ({"gamma": math.nan}, "all finite"),
        ({"kappa": math.inf}, "all finite"),
    ],
)
def test_values_out_of_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        AttentionAlignment(**given)


def test_features_of_other_shapes() -> None:
    with pytest.raises(TrainingError, match=r"teacher .* shape \[3, 6, 7, 8\], the student's \[2, 6, 7, 8\]"):
        AttentionAlignment().loss(features(), features()[:2], quantizer())
