"""Every layer type with a twin: near the float layer at 8 bits, equal to it in mode "float", and with a gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.errors import QuantizationError
from fewbits.layers import dequantize, quantize, set_mode
from fewbits.plan import LayerPlan, Plan, TensorPlan

Make = Callable[[], nn.Module]


def images(*shape: int) -> tuple[int, ...]:
    return (2, 4, *shape)


CONVS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), images(9)),
    "conv1d same": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2), images(9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), images(7, 8)),
    "conv2d valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid", stride=2), images(7, 8)),
    "conv2d no bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), images(7, 8)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), images(7, 8)),
    "conv2d depthwise dilated": (lambda: nn.Conv2d(4, 4, 3, groups=4, dilation=2), images(7, 8)),
    "conv2d oblong": (lambda: nn.Conv2d(4, 6, (1, 3), stride=(2, 1), padding=(0, 1)), images(7, 8)),
    **{
        f"conv2d {mode} {padding}": (
            lambda m=mode, p=padding: nn.Conv2d(4, 6, 3, padding=p, padding_mode=m),
            images(7, 8),
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
        for padding in (2, "same")
    },
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, padding=1), images(3, 4, 5)),
    "conv3d groups circular": (lambda: nn.Conv3d(4, 6, 3, 1, 1, groups=2, padding_mode="circular"), images(3, 4, 5)),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 8)),
    "transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), images(6)),
    "transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), images(5, 4)),
    "transpose2d groups": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2, dilation=2), images(5, 4)),
    "transpose2d no bias": (lambda: nn.ConvTranspose2d(4, 6, 2, bias=False, output_padding=0), images(5, 4)),
    "transpose3d": (lambda: nn.ConvTranspose3d(4, 6, 2, stride=2), images(3, 2, 3)),
    "transpose2d unbatched": (lambda: nn.ConvTranspose2d(4, 6, 3), (4, 7, 8)),
}
LINEARS: dict[str, tuple[Make, tuple[int, ...] | Tensor]] = {
    "linear": (lambda: nn.Linear(4, 6), (16, 4)),
    "linear no bias": (lambda: nn.Linear(4, 6, bias=False), (2, 3, 5, 4)),
    "linear one vector": (lambda: nn.Linear(4, 6), (4,)),
    "embedding": (lambda: nn.Embedding(10, 6), torch.tensor([[1, 2], [9, 0]])),
    "embedding padding": (lambda: nn.Embedding(10, 6, padding_idx=0), torch.tensor([[1, 2], [9, 0]])),
}
LAYERS = CONVS | LINEARS
NAMES = sorted(LAYERS)


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    make, x = LAYERS[name]
    return make(), x if isinstance(x, Tensor) else torch.randn(x)


A8 = TensorPlan(8, symmetric=False)


def plan(layer: nn.Module, weight: TensorPlan, act: TensorPlan | None = A8) -> Plan:
    return Plan((("*", LayerPlan(weight=weight, input=None if isinstance(layer, nn.Embedding) else act)),))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("name", NAMES)
def test_at_eight_bits_a_layer_is_near_the_float_one(name: str, granularity: str) -> None:
    layer, x = build(name)
    want = layer(x)
    weight = TensorPlan(8, granularity=granularity, block=3 if granularity == "block" else None)
    quantize(layer, plan(layer, weight), verbose=False)
    got = layer(x)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert not torch.equal(got, want)
    assert float((got - want).detach().norm() / want.detach().norm()) < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_a_two_bit_weight_takes_few_values(name: str) -> None:
    layer, x = build(name)
    quantize(layer, plan(layer, TensorPlan(2), None), verbose=False)
    got = layer(x)
    reference = copy.deepcopy(dequantize(copy.deepcopy(layer)))
    quantized = layer.weight_quantizer(layer.weight).detach()
    assert len(quantized.unique()) <= 4
    with torch.no_grad():
        reference.weight.copy_(quantized)
    torch.testing.assert_close(got, reference(x))  # the twin runs the very operation, on the quantized weight


@pytest.mark.parametrize("name", NAMES)
def test_mode_float_and_dequantize_are_bit_equal_to_the_original(name: str) -> None:
    layer, x = build(name)
    want, kind, before = layer(x), type(layer), dict(vars(layer))
    quantize(layer, plan(layer, TensorPlan(3)), verbose=False)
    with set_mode(layer, "float"):
        assert torch.equal(layer(x), want)
    assert not torch.equal(layer(x), want)
    dequantize(layer)
    assert type(layer) is kind and torch.equal(layer(x), want)
    assert set(vars(layer)) == set(before)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_weight_bias_input_and_scales(name: str) -> None:
    layer, x = build(name)
    quantize(layer, plan(layer, TensorPlan(4, granularity="channel")), verbose=False)
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    y = layer(x)
    (y * torch.randn_like(y)).sum().backward()
    grads = {n: p.grad for n, p in layer.named_parameters()} | ({"x": x.grad} if x.is_floating_point() else {})
    for parameter, grad in grads.items():
        assert grad is not None and bool(torch.isfinite(grad).all()) and bool(grad.any()), parameter


def test_weight_scales_run_along_the_output_channels() -> None:
    groups = {}
    for name in NAMES:
        layer, _ = build(name)
        quantize(layer, plan(layer, TensorPlan(4, granularity="channel"), None), verbose=False)
        groups[name] = layer.weight_quantizer.groups
    for name, count in groups.items():
        expected = {"embedding": 10, "conv2d depthwise dilated": 4, "transpose2d groups": 3}
        assert count == expected.get(name.removesuffix(" padding"), 6), name


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d", "conv2d unbatched", "transpose2d unbatched", "linear"])
def test_an_input_scale_a_channel_follows_the_channel_axis(name: str) -> None:
    layer, x = build(name)
    act = TensorPlan(8, granularity="channel")
    axis = {"linear": -1}.get(name, -x.ndim + (0 if "unbatched" in name else 1))
    if "unbatched" in name:  # as many rows as channels: the wrong axis would fit, too
        x = torch.randn(4, 4, 8)
    weight_of_channel = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    x = x * weight_of_channel.reshape([-1 if a - x.ndim == axis else 1 for a in range(x.ndim)])
    quantize(layer, plan(layer, TensorPlan(8), act), verbose=False)
    layer(x)
    ratio = layer.input_quantizer.scale.detach() / weight_of_channel
    assert ratio.max() / ratio.min() < 10


@pytest.mark.parametrize(
    ("options", "size"), [({}, None), ({"stride": 2, "padding": 1}, (10, 7)), ({"stride": 3}, (16, 14))]
)
def test_transposed_convolution_takes_an_output_size(options: dict[str, Any], size: tuple[int, int] | None) -> None:
    layer, x = nn.ConvTranspose2d(4, 6, 3, **options), torch.randn(images(5, 4))
    want = layer(x, output_size=size)
    quantize(layer, plan(layer, TensorPlan(8)), verbose=False)
    got = layer(x, output_size=size)
    assert got.shape == want.shape and (size is None or got.shape[2:] == size)
    with set_mode(layer, "float"):
        assert torch.equal(layer(x, output_size=size), want)
    with pytest.raises(ValueError, match="output size"):
        layer(x, output_size=(100, 100))


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_the_padding_row_of_an_embedding_stays_zero_and_gets_no_gradient(bits: int) -> None:
    layer = nn.Embedding(5, 4, padding_idx=2)
    quantize(layer, plan(layer, TensorPlan(bits, granularity="channel")), verbose=False)
    y = layer(torch.tensor([2, 3, 2]))
    assert float(y[0].detach().abs().max()) < 1e-30
    y.sum().backward()
    assert not layer.weight.grad[2].any() and layer.weight.grad[3].any()


def test_an_embedding_scales_gradients_by_frequency() -> None:
    layer = nn.Embedding(5, 4, scale_grad_by_freq=True)
    quantize(layer, plan(layer, TensorPlan(8, "ste")), verbose=False)
    layer(torch.tensor([1, 1, 3])).sum().backward()
    torch.testing.assert_close(layer.weight.grad[1], torch.ones(4))


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}])
def test_an_embedding_that_changes_its_table_is_refused(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Embedding(5, 4, **options), nn.Linear(4, 4))
    with pytest.raises(QuantizationError, match=r"layer '0'.*max_norm or sparse"):
        quantize(model, Plan((("*", LayerPlan(weight=TensorPlan(4))),)), verbose=False)


def test_an_embedding_has_no_input_to_quantize_and_only_attention_has_operands() -> None:
    with pytest.raises(QuantizationError, match="layer 'e': a Embedding has no real-valued input: drop 'input'"):
        quantize(nn.ModuleDict({"e": nn.Embedding(5, 4)}), Plan((("e", LayerPlan(input=TensorPlan(8))),)))
    with pytest.raises(QuantizationError, match="layer 'l': 'operands' is for attention, a Linear has none"):
        quantize(nn.ModuleDict({"l": nn.Linear(5, 4)}), Plan((("l", LayerPlan(operands=TensorPlan(8))),)))


def test_weight_only_and_input_only() -> None:
    x = torch.randn(3, 4)
    for layer_plan in (LayerPlan(weight=TensorPlan(4)), LayerPlan(input=TensorPlan(4))):
        layer = nn.Linear(4, 6)
        want = layer(x)
        quantize(layer, Plan((("*", layer_plan),)), verbose=False)
        assert not torch.equal(layer(x), want)
        assert (layer.weight_quantizer is None) == (layer_plan.weight is None)
        assert (layer.input_quantizer is None) == (layer_plan.input is None)


def test_the_output_is_quantized_where_the_plan_says_so() -> None:
    layer, x = nn.Linear(4, 6), torch.randn(50, 4)
    quantize(layer, Plan((("*", LayerPlan(output=TensorPlan(2, symmetric=False))),)), verbose=False)
    assert len(layer(x).unique()) <= 4
    with pytest.raises(QuantizationError, match="an output is quantized per tensor, not per channel"):
        quantize(layer, Plan((("*", LayerPlan(output=TensorPlan(2, granularity="channel"))),)), verbose=False)


def test_gpt2_conv1d_stores_its_weight_the_other_way_round() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer, x = conv1d(6, 4), torch.randn(2, 3, 4)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([1.0, 10, 100, 1e3, 1e4, 1e5]))  # an output channel is a column
        layer.bias.normal_()
    want = layer(x)
    quantize(layer, plan(layer, TensorPlan(8, granularity="channel")), verbose=False)
    assert layer.weight_quantizer.groups == 6
    error = (layer(x) - want).detach().norm(dim=(0, 1)) / want.detach().norm(dim=(0, 1))
    assert float(error.max()) < 0.03
    with set_mode(layer, "float"):
        torch.testing.assert_close(layer(x), want)
    dequantize(layer)
    assert torch.equal(layer(x), want) and type(layer) is conv1d


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    for name in ("linear", "conv2d"):
        layer, x = build(name)
        layer, x = layer.to(dtype), x.to(dtype)
        want = layer(x)
        quantize(layer, plan(layer, TensorPlan(8)), verbose=False)
        got = layer(x)
        assert got.dtype == dtype
        assert float((got - want).detach().norm() / want.detach().norm()) < 0.03


def test_an_empty_batch_passes() -> None:
    layer = nn.Linear(4, 6)
    quantize(layer, plan(layer, TensorPlan(8)), verbose=False)
    assert layer(torch.empty(0, 4)).shape == (0, 6)
