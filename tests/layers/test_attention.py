"""Attention with quantized operands, and the twin of nn.MultiheadAttention."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fewbits.errors import PlanError, QuantizationError
from fewbits.layers import calibrate, dequantize, quantize, quantized_layers, set_mode, wrap_owners
from fewbits.layers.attention import OPERANDS, additive, masked_softmax
from fewbits.plan import LayerPlan, Plan, TensorPlan

A8 = TensorPlan(8, symmetric=False, range="minmax")
W8 = TensorPlan(8, granularity="channel", range="minmax")
FULL = LayerPlan(weight=W8, input=A8, operands=A8)


class Caller(nn.Module):
    """Calls an attention with one set of arguments, so that plans have a name for it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, **options).eval()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.attn(*args, **kwargs)


def swap(model: nn.Module, plan: LayerPlan = FULL, name: str = "attn") -> Any:
    """Quantize one layer of a model; return the layer."""
    quantize(model, Plan(((name, plan),)), verbose=False)
    wrap_owners(model)
    return model.get_submodule(name)


def masks(kind: str, rows: int, batch: int, length: int, source: int) -> dict[str, Tensor | bool]:
    """Return the mask arguments of a kind; every query may look at the first key."""
    boolean = torch.rand(length, source) < 0.4
    boolean[:, 0] = False
    padding = torch.rand(batch, source) < 0.4
    padding[:, 0] = False
    causal = torch.ones(length, source, dtype=torch.bool).triu(1)
    return {
        "none": {},
        "bool": {"attn_mask": boolean},
        "float": {"attn_mask": torch.randn(length, source)},
        "per head": {"attn_mask": boolean.expand(rows, -1, -1).clone()},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(batch, source)},
        "both": {"attn_mask": boolean, "key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
    }[kind]


KINDS = ("none", "bool", "float", "per head", "padding", "float padding", "both", "causal")


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("inputs", ["self", "cross", "distinct"])
@pytest.mark.parametrize("kind", KINDS)
def test_float_mode_is_torch(kind: str, inputs: str, batch_first: bool) -> None:
    """In mode float the twin and nn.MultiheadAttention agree, with and without weights."""
    model = Caller(batch_first=batch_first, bias=inputs != "cross")
    query = torch.randn(2, 5, 12)
    key = query if inputs == "self" else torch.randn(2, 5 if kind == "causal" else 7, 12)
    value = torch.randn_like(key) if inputs == "distinct" else key
    mask = masks(kind, 6, 2, query.shape[1], key.shape[1])
    if not batch_first:
        swapped = {id(x): x.transpose(0, 1) for x in (query, key, value)}
        query, key, value = (swapped[id(x)] for x in (query, key, value))
    twin = copy.deepcopy(model)
    swap(twin)
    for options in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        expected = model(query, key, value, **mask, **options)
        with set_mode(twin, "float"):
            out, weights = twin(query, key, value, **mask, **options)
        torch.testing.assert_close(out, expected[0], atol=1e-5, rtol=1e-5)
        if expected[1] is None:
            assert weights is None
        else:
            torch.testing.assert_close(weights, expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(batch_first: bool) -> None:
    """[L, E] inputs give [L, E] and [L, S], whatever batch_first says."""
    model = Caller(batch_first=batch_first)
    x, memory, padding = torch.randn(4, 12), torch.randn(6, 12), torch.tensor([False] * 5 + [True])
    expected = model(x, memory, memory, key_padding_mask=padding)
    swap(model)
    with set_mode(model, "float"):
        out = model(x, memory, memory, key_padding_mask=padding)
    assert out[0].shape == (4, 12)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_quantized_result_is_that_of_the_operands_quantized_by_hand() -> None:
    """Each of the four operands, the input and the weight pass through their quantizer, and nothing else changes."""
    model, x = Caller(batch_first=True), torch.randn(2, 5, 12)
    attn = swap(model, LayerPlan(weight=W8, input=A8, operands=TensorPlan(3, symmetric=False, granularity="head")))
    calibrate(model, [(x, x, x)])
    weight = attn.weight_quantizer(attn.in_proj_weight)
    qkv = F.linear(attn.input_quantizer(x), weight, attn.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    scores = attn.query_quantizer(q) @ attn.key_quantizer(k.mT) / math.sqrt(4)
    p = attn.probability_quantizer(scores.softmax(-1))
    out = (p @ attn.value_quantizer(v)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(model(x, x, x)[0], attn.out_proj(out))
    torch.testing.assert_close(model(x, x, x)[1], p.mean(1))
    assert attn.query_quantizer.scale.shape == (3,)  # one for each head


def test_probabilities_use_all_codes() -> None:
    """Even under a symmetric plan: a signed grid would leave half of its codes unused."""
    attn = swap(Caller(), LayerPlan(operands=TensorPlan(2)))
    assert attn.query_quantizer.plan.symmetric
    assert not attn.probability_quantizer.plan.symmetric
    p = torch.rand(1, 3, 5, 5)
    attn.probability_quantizer.calibrate(p)
    assert attn.probability_quantizer.encode(p).values.unique().tolist() == [0, 1, 2, 3]


def test_one_input_quantizer_sees_each_distinct_tensor_once() -> None:
    """Its range is joint: that of all distinct inputs together."""
    query, memory = torch.randn(2, 5, 12), 3 * torch.randn(2, 7, 12)
    expected = swap(Caller(), FULL).input_quantizer
    for inputs, seen in (((query,) * 3, query), ((query, memory, memory), torch.cat([query, memory], 1))):
        model = Caller(batch_first=True)
        attn = swap(model)
        calibrate(model, [inputs])
        expected.reset()
        expected.calibrate(seen)
        assert attn.input_quantizer.calibrated == 1
        assert torch.equal(attn.input_quantizer.scale, expected.scale)
        sizes: list[int] = []
        attn.input_quantizer.register_forward_hook(lambda _, args, out, sizes=sizes: sizes.append(out.numel()))
        assert model(*inputs)[0].isfinite().all()
        assert sizes == [seen.numel()]


def test_without_operands_the_matmuls_stay_in_float() -> None:
    """A weight-only plan equals the float layer with the quantized weight."""
    model, x = Caller(batch_first=True), torch.randn(2, 5, 12)
    plain = copy.deepcopy(model)
    attn = swap(model, LayerPlan(weight=TensorPlan(2)))
    assert all(getattr(attn, f"{name}_quantizer") is None for name in OPERANDS)
    plain.attn.in_proj_weight.data = attn.weight_quantizer(attn.in_proj_weight).detach()
    torch.testing.assert_close(model(x, x, x)[0], plain(x, x, x)[0])


@pytest.mark.parametrize("options", [{"kdim": 8}, {"vdim": 8}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_unsupported_options_are_refused_by_name(options: dict[str, Any]) -> None:
    model = Caller(**options)
    reason = next(iter(options))
    with pytest.raises(QuantizationError, match=rf"'attn'.*{reason}"):
        swap(model, LayerPlan(operands=A8))
    assert type(model.attn) is nn.MultiheadAttention


def test_plans_that_attention_cannot_follow() -> None:
    with pytest.raises(QuantizationError, match=r"'attn'.*output projection"):
        swap(Caller(), LayerPlan(operands=A8, output=A8))
    with pytest.raises(PlanError, match=r"'attn'.*operand 'query'.*blocks of an activation"):
        swap(Caller(), LayerPlan(operands=TensorPlan(4, granularity="block", block=4)))
    model, x = Caller(), torch.randn(5, 2, 12)
    swap(model)
    with pytest.raises(QuantizationError, match="give attn_mask"):
        model(x, x, x, is_causal=True)


def test_non_finite_activations_are_named() -> None:
    model = Caller()
    swap(model, LayerPlan(operands=A8))
    x = torch.full((3, 1, 12), float("nan"))
    with pytest.raises(QuantizationError, match=r"'attn'.*NaN"):
        calibrate(model, [(x, x, x)])


def test_dropout_in_training_only() -> None:
    """Dropout comes behind the probability quantizer, so the range stays that of probabilities."""
    model, x = Caller(batch_first=True, dropout=0.5), torch.randn(8, 6, 12)
    attn = swap(model)
    calibrate(model, [(x, x, x)])
    model.eval()
    assert torch.equal(model(x, x, x)[0], model(x, x, x)[0])
    model.train()
    weights = model(x, x, x, average_attn_weights=False)[1]
    assert 0.4 < (weights == 0).double().mean() < 0.7
    kept = weights[weights > 0] / 2 / attn.probability_quantizer.scale
    torch.testing.assert_close(kept, kept.round(), atol=1e-3, rtol=0)


def test_gradients_reach_everything() -> None:
    model, x = Caller(batch_first=True), torch.randn(2, 5, 12, requires_grad=True)
    swap(model)
    calibrate(model, [(x.detach(),) * 3])
    model(x, x, x)[0].square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def encoder() -> nn.TransformerEncoder:
    """Two encoder layers in eval, which torch runs by a fused kernel."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def test_fused_encoder_kernel_does_not_bypass_the_twin() -> None:
    """In eval without gradients torch would read the weights of a whole encoder layer at once."""
    model, x = encoder(), torch.randn(3, 6, 16)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True  # with a padding mask torch would even make a nested tensor
    with torch.no_grad():
        expected = model(x), model(x, src_key_padding_mask=padding)
        attn = swap(model, LayerPlan(weight=TensorPlan(2), input=A8, operands=A8), "layers.0.self_attn")
        calibrate(model, [x])
        found = model(x), model(x, src_key_padding_mask=padding)
        with set_mode(model, "float"):
            as_float = model(x), model(x, src_key_padding_mask=padding)
        assert attn.input_quantizer.calibrated and attn.value_quantizer.calibrated
        for before, quantized, floats in zip(expected, found, as_float):
            kept = before.abs().sum(-1) > 0  # the nested tensor pads with zeros
            assert (before - quantized)[kept].abs().max() > 0.02
            torch.testing.assert_close(floats[kept], before[kept], atol=1e-5, rtol=1e-5)
        dequantize(model)
        assert torch.equal(model(x), expected[0])


@pytest.mark.parametrize("name", ["layers.1.linear1", "layers.1.linear2", "layers.0.self_attn.out_proj"])
def test_plan_for_one_child_of_an_encoder_is_followed(name: str) -> None:
    """The owners that would read the child's weight are swapped in with an empty plan."""
    model, x = encoder(), torch.randn(3, 6, 16)
    plain = copy.deepcopy(model)
    layer = swap(model, LayerPlan(weight=TensorPlan(2)), name)
    plain.get_submodule(name).weight.data = layer.weight_quantizer(layer.weight).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)
    assert dequantize(model) and not quantized_layers(model)
    assert type(model) is nn.TransformerEncoder


def test_decoder_cross_attention() -> None:
    """nn.TransformerDecoderLayer calls both of its attentions as modules; both are calibrated."""
    model = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True).eval()
    batch = (torch.randn(2, 5, 16), torch.randn(2, 7, 16))
    expected = model(*batch)
    quantize(model, Plan((("self_attn", FULL), ("multihead_attn", FULL))), verbose=False)
    wrap_owners(model)
    calibrate(model, [batch])
    error = (model(*batch) - expected).norm() / expected.norm()
    assert 0 < error < 0.03


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.randoms(use_true_random=False))
def test_masked_softmax_is_torchs_attention(heads: int, length: int, source: int, forbid: bool, random: Any) -> None:
    """Random masks, among them rows that forbid all: zeros as in torch, and finite gradients."""
    generator = torch.Generator().manual_seed(random.randrange(1000))
    q = torch.randn(1, heads, length, 4, generator=generator, requires_grad=True)
    k, v = torch.randn(2, 1, heads, source, 4, generator=generator)
    allowed = torch.rand(heads, length, source, generator=generator) < 0.5
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    mask = ~allowed if forbid else allowed
    found = masked_softmax(q @ k.mT / 2, additive(mask, q, forbidden=forbid)) @ v
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()
