"""Size: by hand, and to the byte of what pack and save write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fewbits.cost import LayerShape, ModelShape, arithmetic_bits, bops, layer_size, model_shape, size, stored_bits
from fewbits.errors import PlanError
from fewbits.plan import LayerPlan, Plan, TensorPlan

CHANNEL = TensorPlan(3, granularity="channel")


def test_one_layer_by_hand() -> None:
    layer = LayerShape("conv", "Conv2d", (5, 3, 3, 3), out_channels=5, bias=5, input_channels=3)
    row = layer_size(layer, LayerPlan(CHANNEL, TensorPlan(4, symmetric=False)))
    assert (row.codes, row.scales, row.floats) == (-(-135 * 3 // 8), 5 * 4 + 8, 5 * 4)
    assert layer_size(layer, LayerPlan()).total == 135 * 4 + 5 * 4


@pytest.mark.parametrize(
    ("plan", "scales"),
    [
        (TensorPlan(4), 1),
        (TensorPlan(4, granularity="channel"), 5),
        (TensorPlan(4, granularity="block", block=2), 5 * 2 * 9),  # ceil(3 / 2) blocks for each of 9 taps
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_and_zero_points(plan: TensorPlan, scales: int, symmetric: bool) -> None:
    layer = LayerShape("conv", "Conv2d", (5, 3, 3, 3), out_channels=5)
    plan = TensorPlan(4, granularity=plan.granularity, block=plan.block, symmetric=symmetric)
    assert layer_size(layer, LayerPlan(plan)).scales == scales * (4 if symmetric else 8)


@pytest.mark.parametrize(
    ("sparsity", "stored", "arithmetic"),
    [("1:2", 1.0, 0.5), ("2:4", 1.5, 0.5), ("2:8", 1.0, 0.25), ("1:4", 0.75, 0.25), ("1:8", 0.5, 0.125), (None, 1, 1)],
)
def test_bits_of_a_sparse_weight(sparsity: str | None, stored: float, arithmetic: float) -> None:
    plan = TensorPlan(1, sparsity=sparsity)
    assert (stored_bits(plan), arithmetic_bits(plan)) == (stored, arithmetic)
    layer = LayerShape("head", "Linear", (16, 128), out_channels=16)
    assert layer_size(layer, LayerPlan(plan)).codes == 16 * 128 * stored / 8
    shape = ModelShape((layer,))
    assert size(Plan((("*", LayerPlan(plan)),)), shape).average_weight_bits == stored


@pytest.mark.parametrize(("symmetric", "overhead"), [(False, 0.5), (True, 0.25)])
def test_scales_of_blocks_of_128(symmetric: bool, overhead: float) -> None:
    """One float32 scale (and offset) a block."""
    layer = LayerShape("head", "Linear", (16, 512), out_channels=16)
    plan = TensorPlan(1, "denoise", symmetric=symmetric, granularity="block", block=128)
    assert layer_size(layer, LayerPlan(plan)).scales * 8 / layer.numel == overhead


def test_a_folded_norm_goes_and_leaves_a_bias_and_channel_scales() -> None:
    layer = LayerShape("conv", "Conv2d", (5, 3, 1, 1), out_channels=5, batch_norm="bn", norm_bytes=88)
    folded = layer_size(layer, LayerPlan(TensorPlan(8)))
    assert (folded.scales, folded.floats) == (5 * 4, 5 * 4)
    kept = layer_size(layer, LayerPlan(TensorPlan(8), output=TensorPlan(8, symmetric=False)))
    assert (kept.scales, kept.floats) == (4 + 8, 88)


def test_average_bits_count_float_layers_in_full_and_shared_ones_once() -> None:
    layers = (
        LayerShape("a", "Linear", (4, 4)),
        LayerShape("b", "Linear", (4, 4), shared="a"),
        LayerShape("c", "Linear", (2, 4)),
    )
    plan = Plan((("a", LayerPlan(CHANNEL)), ("b", LayerPlan(CHANNEL))))
    assert size(plan, ModelShape(layers)).average_weight_bits == pytest.approx((16 * 3 + 8 * 32) / 24)


def test_a_rule_for_no_layer_is_an_error() -> None:
    shape = ModelShape((LayerShape("stem", "Linear", (4, 4)),))
    with pytest.raises(PlanError, match="did you mean 'stem'"):
        size(Plan((("stam", LayerPlan(CHANNEL)),)), shape)


class Net(nn.Module):
    """Every kind of row of the table: folded and unfolded norms, groups, transposed, attention, tied, float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.group, self.lone = nn.Conv2d(6, 6, 3, groups=3), nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head, self.twin = nn.Linear(4, 7, bias=False), nn.Linear(4, 7)
        self.twin.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        x = self.up(self.lone(torch.relu(self.group(x))))
        x = x.flatten(2).transpose(1, 2)
        x = self.norm(x + self.attention(x, x, x)[0])
        out: Tensor = self.head(x) + self.twin(x)
        return out


def tensor_bytes(model: nn.Module, example: Tensor | None) -> int:
    """Return the bytes of all tensors in the packed file."""
    from fewbits.deploy import pack, save
    from fewbits.deploy.file import read

    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(pack(model, example), path)
        return sum(blob.numel() for blob in read(path)[0].values())


KINDS: list[dict[str, Any]] = [
    {},
    {"symmetric": False},
    {"quantizer": "denoise"},
    {"quantizer": "denoise", "symmetric": False},
    {"sparsity": "1:2"},
]
weights = st.builds(
    lambda bits, kind, where: TensorPlan(bits, granularity=where[0], block=where[1], range="minmax", **kind),
    st.integers(1, 8),
    st.sampled_from(KINDS),
    st.sampled_from([("tensor", None), ("channel", None), ("block", 4)]),
)
activations = st.none() | st.builds(
    lambda bits, symmetric: TensorPlan(bits, symmetric=symmetric, range="minmax"),
    st.sampled_from([2, 4, 8, 16]),
    st.booleans(),
)


@settings(max_examples=15)
@given(
    data=st.data(), tied=weights, one_input=activations, operands=activations, output=activations, fold=st.booleans()
)
def test_size_is_that_of_the_packed_file(
    data: Any, tied: TensorPlan, one_input: Any, operands: Any, output: Any, fold: bool
) -> None:
    import fewbits

    model, example = Net().eval(), torch.randn(2, 3, 6, 6)
    rules: list[Any] = []
    for layer in model_shape(model).layers:
        weight = tied if layer.name in ("head", "twin") else data.draw(st.none() | weights, label=layer.name)
        if weight is not None and layer.weight_shape[layer.contraction_axis] % 2:
            weight = replace(weight, sparsity=None)
        rules.append((layer.name, LayerPlan(weight, one_input, operands if layer.heads else None)))
    rules += [("bn", LayerPlan(output=output))] * (output is not None)
    plan = Plan(tuple(rules))
    before = size(plan, model_shape(model, example if fold else None))
    fewbits.calibrate(fewbits.quantize(model, plan, verbose=False), [example])
    assert before.total == tensor_bytes(model, example if fold else None)
    assert before == size(plan, model_shape(model, example if fold else None))  # quantized or not
    assert before.total == before.codes + before.scales + before.floats


def test_a_glob_rule_asks_of_a_layer_what_it_has() -> None:
    conv = LayerShape("conv", "Conv2d", (5, 3, 3, 3), out_channels=5, macs=10)
    attention = LayerShape(
        "attention", "Gate", (), has_input=False, heads=4, operands=("query", "key"), operand_macs=100
    )
    shape, operands = ModelShape((conv, attention), ran=True), TensorPlan(8, symmetric=False, granularity="head")
    plan = Plan((("*", LayerPlan(CHANNEL, TensorPlan(4), operands)),))
    rows = size(plan, shape).layers
    assert rows[0].total == -(-135 * 3 // 8) + 5 * 4 + 4
    assert rows[1].total == 2 * 4 * (4 + 4), "two operands with a scale and a zero point for each of 4 heads"
    assert bops(plan, shape) == 10 * 3 * 4 + 100 * 8 * 8
