"""The policy W-A-Att, and the twins of both attentions that it quantizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewbits.errors import PlanError
from fewbits.layers import calibrate, quantize, quantized_layers, set_mode
from fewbits.layers.attention import AttentionLayer
from fewbits.plan import LayerPlan, Plan, TensorPlan
from fewbits.tasks.open_vocabulary.attention import ImagePoolingAttention, MaxSigmoidAttention
from fewbits.tasks.open_vocabulary.detector import OpenVocabularyDetector
from fewbits.tasks.open_vocabulary.policy import parse_policy, policy_4_4_8
from tests.tasks.open_vocabulary.made import tiny_detector

HEAD8 = Plan((("", LayerPlan(operands=TensorPlan(8, "lsq+", symmetric=False, granularity="head"))),))


def quantized() -> OpenVocabularyDetector:
    model = tiny_detector()
    quantize(model, policy_4_4_8(model), verbose=False)
    calibrate(model, [torch.randn(2, 3, 64, 64)])
    return model


def test_what_stays_in_float_and_what_gets_4_and_8_bits() -> None:
    model = quantized()
    layers = quantized_layers(model)
    inner = {name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    floats = {"backbone.stem.0", *(f"heads.{i}.{out}" for i in range(3) for out in ("class_out", "box_out"))}
    assert inner - set(layers) == floats
    attentions = {f"neck.{name}.attention" for name in ("top4", "top3", "out4", "out5")} | {"neck.enhance"}
    assert set(layers) - inner == attentions
    for name, layer in layers.items():
        plan = layer.layer_plan
        if name in attentions:
            assert plan.weight is None and plan.operands is not None
            assert (plan.operands.bits, plan.operands.granularity, plan.operands.symmetric) == (8, "head", False)
        else:
            assert plan.weight is not None and plan.input is not None and plan.operands is None
            assert (plan.weight.bits, plan.weight.granularity, plan.weight.symmetric) == (4, "channel", True)
            assert (plan.input.bits, plan.input.granularity, plan.input.symmetric) == (4, "tensor", False)


def test_each_operand_has_a_scale_and_a_zero_point_for_each_head() -> None:
    model = quantized()
    for name, module in model.named_modules():
        if isinstance(module, (MaxSigmoidAttention, ImagePoolingAttention)):
            assert isinstance(module, AttentionLayer)
            operands = ("query", "key") if isinstance(module, MaxSigmoidAttention) else module.operand_axes
            found = [m for child, m in module.named_children() if child.endswith("_quantizer")]
            assert len(found) == len(operands) == (2 if "attention" in name else 4)
            for operand in operands:
                quantizer = getattr(module, f"{operand}_quantizer")
                assert quantizer.scale.shape == quantizer.zero_point.shape == (module.heads,)
                assert quantizer.calibrated == 1 and len(set(quantizer.scale.tolist())) == module.heads
    probability = model.neck.enhance.probability_quantizer
    zero = probability.affine()[1]
    assert torch.equal(zero, torch.full_like(zero, probability.grid.lowest)), "probabilities are never negative"


def test_all_its_quantizers_learn() -> None:
    model = quantized().train()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not idle
    scales = [
        p for name, p in model.named_parameters() if name.endswith(("query_quantizer.scale", "key_quantizer.scale"))
    ]
    assert len(scales) == 10 and all(p.grad is not None and p.grad.any() for p in scales)


def test_max_sigmoid_attention_on_rounded_operands() -> None:
    layer, x, texts = MaxSigmoidAttention(16, 12, 8).eval(), torch.randn(2, 16, 3, 4), torch.randn(5, 12)
    want = layer(x, texts)
    calibrate(quantize(layer, HEAD8, verbose=False), [(x, texts)])
    got = layer(x, texts)
    assert 0 < (got - want).abs().max() < 0.02
    with set_mode(layer, "float"):
        assert torch.equal(layer(x, texts), want)
    query = layer.query_quantizer(x.reshape(2, 2, 8, 12).mT)
    key = layer.key_quantizer(layer.guide(texts).reshape(5, 2, 8).transpose(0, 1).mT)
    gate = ((query @ key).amax(-1) / 8**0.5 + layer.bias[:, None]).sigmoid().reshape(2, 2, 1, 3, 4)
    y = layer.norm(layer.project(x)).reshape(2, 2, 8, 3, 4)
    torch.testing.assert_close(got, (y * gate).reshape(2, 16, 3, 4))


def test_image_pooling_attention_on_rounded_operands() -> None:
    layer = ImagePoolingAttention((4, 6), 12, 16, 8).eval()
    features, texts = (torch.randn(2, 4, 6, 6), torch.randn(2, 6, 3, 3)), torch.randn(5, 12)
    want = layer(features, texts)
    calibrate(quantize(layer, HEAD8, verbose=False), [(features, texts)])
    got = layer(features, texts)
    assert got.shape == (2, 5, 12) and 0 < (got - want).abs().max() < 0.02
    with set_mode(layer, "float"):
        assert torch.equal(layer(features, texts), want)


def test_other_bits_and_channels_of_activations() -> None:
    plan = policy_4_4_8(tiny_detector(), 3, 3, 8, act_granularity="channel")
    _, first = plan.rules[0]
    assert first is not None and first.weight is not None and first.input is not None
    assert (first.weight.bits, first.input.bits, first.input.granularity) == (3, 3, "channel")
    assert plan.decided_from["bits"] == "3-3-8"
    model = quantize(tiny_detector(), plan, verbose=False)
    calibrate(model, [torch.randn(2, 3, 64, 64)])
    assert model.get_submodule("neck.top4.attention.guide.input_quantizer").scale.shape == (32,)


@pytest.mark.parametrize("text", ["4-4", "4-4-8-8", "w4-4-8", "4--8", ""])
def test_a_policy_that_is_none(text: str) -> None:
    assert parse_policy("4-5-8") == (4, 5, 8)
    with pytest.raises(PlanError, match="such as 4-4-8; got"):
        parse_policy(text)


def test_a_model_of_other_layers() -> None:
    with pytest.raises(PlanError, match="is for an OpenVocabularyDetector, got a Sequential"):
        policy_4_4_8(nn.Sequential(nn.Conv2d(3, 8, 3)))
