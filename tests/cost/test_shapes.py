"""The shape of a model: MACs by hand, what folds, what is shared."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.cost import model_shape
from fewbits.errors import QuantizationError


def macs(model: nn.Module, *example: Tensor) -> list[int]:
    return [layer.macs for layer in model_shape(model, example).layers]


def test_macs_of_a_strided_grouped_convolution() -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
    # 6 channels of 4 x 4 outputs, each over 2 input channels and 9 taps
    assert macs(conv, torch.randn(1, 4, 8, 8)) == [6 * 4 * 4 * 2 * 9]


def test_macs_of_a_transposed_convolution_count_each_input_once_per_weight() -> None:
    conv = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    (layer,) = model_shape(conv, torch.randn(1, 4, 5, 5)).layers
    assert layer.macs == 4 * 25 * 3 * 9
    assert (layer.weight_shape, layer.out_channels, layer.channel_axis) == ((4, 3, 3, 3), 6, 1)


def test_linear_runs_on_all_leading_axes_and_an_embedding_multiplies_nothing() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 5))
    index = torch.zeros(2, 7, dtype=torch.long)
    assert macs(model, index) == [0, 2 * 7 * 8 * 5]
    assert [layer.has_input for layer in model_shape(model).layers] == [False, True]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_with_its_uncalled_output_projection(batch_first: bool, need_weights: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    x, y = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    if not batch_first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    example = {"query": x, "key": y, "value": y, "need_weights": need_weights}
    whole, projection = model_shape(attention, example).layers
    assert whole.macs == (10 + 6 + 6) * 8 * 8
    assert projection.macs == 10 * 8 * 8
    assert projection.input_elements == 80
    assert whole.operand_macs == 2 * (2 * 5 * 3 * 8)
    assert (whole.heads, projection.heads) == (2, 0)


def test_attention_that_reads_the_weights_of_its_children() -> None:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    attention = swin.ShiftedWindowAttention(8, [2, 2], [0, 0], num_heads=2)
    shape = {layer.name: layer for layer in model_shape(attention, torch.randn(1, 4, 4, 8)).layers}
    assert shape["qkv"].macs == 16 * 8 * 24
    assert shape["proj"].macs == 16 * 8 * 8
    assert shape[""].operand_macs == 2 * (16 * 4 * 8)  # 4 windows of 4 tokens


class Branches(nn.Module):
    """Four convolutions with a batch norm each, of which only the first may fold."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norms[0](self.convs[0](x))
        y = self.convs[1](x)
        x = self.norms[1](y) + y  # used twice
        x = self.norms[2](F.relu(self.convs[2](x)))  # something in between
        y = self.convs[3](x)
        return self.norms[3](y), y  # the result needs it too


def test_only_a_norm_that_alone_uses_a_layer_folds() -> None:
    layers = model_shape(Branches(), torch.randn(1, 3, 4, 4)).layers
    assert [layer.batch_norm for layer in layers] == ["norms.0", "", "", ""]
    assert layers[0].norm_bytes == 4 * 3 * 4 + 8  # four vectors and the int64 counter


def test_without_an_example_nothing_folds_and_nothing_is_multiplied() -> None:
    shape = model_shape(Branches())
    assert not shape.ran
    assert all(not layer.batch_norm and not layer.macs for layer in shape.layers)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.scale = nn.Embedding(11, 6), nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("gone", torch.zeros(5), persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(index) * self.scale)
        return logits


def test_shared_weights_and_what_is_left_in_float() -> None:
    shape = model_shape(Tied(), torch.zeros(1, 2, dtype=torch.long))
    assert [(layer.name, layer.shared) for layer in shape.layers] == [("embed", ""), ("head", "embed")]
    assert shape.numel == 66
    assert shape.float_bytes == 6 * 4 + 3 * 8


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model[1].eval()
    before = model[1].running_mean.clone()
    model_shape(model, torch.randn(2, 3, 8, 8))
    assert [m.training for m in model] == [True, False, True]
    assert torch.equal(model[1].running_mean, before)
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


def test_a_model_without_quantizable_layers_is_an_error() -> None:
    with pytest.raises(QuantizationError, match=r"no quantizable layer: it holds .*ReLU"):
        model_shape(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))
