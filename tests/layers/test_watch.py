"""Weights that are read without a call, and errors that tell which layer they come from."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbits as fb
from fewbits.errors import QuantizationError
from fewbits.layers import Watch, call, quantized_layers
from fewbits.plan import LayerPlan, Plan, TensorPlan
from tests.zoo import ZOO

WEIGHTS = Plan((("*", LayerPlan(TensorPlan(8, granularity="channel"))),))
Read = Callable[[Tensor, Tensor], Tensor]

READS: dict[str, Read] = {
    "mean": lambda x, w: x + w.mean(0),
    "transposed": lambda x, w: x @ w.T.mean(1, keepdim=True) + x,
    "rows": lambda x, w: x + w[torch.tensor([0, 2])].sum(0),
    "cast": lambda x, w: x + w.to(x).sum(),
    "keyword": lambda x, w: F.linear(x, weight=w).sum(1, keepdim=True) + x,
    "inside a list": lambda x, w: torch.cat([x, w]),
}
LOOKS: dict[str, Read] = {
    "shape": lambda x, w: x * w.shape[0] * w.size(1) * w.numel(),
    "type": lambda x, w: x.to(w.dtype).to(w.device).type_as(w).to(w),
    "like": lambda x, w: x + torch.zeros_like(w)[0] + w.new_zeros(8),
}


class Reader(nn.Module):
    """x [N, 8] meets the weight [4, 8] of an embedding that is never called, then a linear layer."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.table, self.head, self.read = nn.Embedding(4, 8), nn.Linear(8, 2), read

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(x, self.table.weight))


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_weight_that_is_read_without_a_call_is_refused_with_a_cure(read: Read) -> None:
    model, x = Reader(read), torch.randn(3, 8)
    fb.quantize(model, WEIGHTS, verbose=False)
    cure = r"^layer 'table': .* this Embedding without calling .*plan\.override\(\('table', None\)\)$"
    with pytest.raises(QuantizationError, match=cure):
        fb.calibrate(model, [x])
    with pytest.raises(QuantizationError, match=cure):
        fb.pack(model, x)
    fb.quantize(model, WEIGHTS.override(("table", None)), verbose=False)
    packed = fb.pack(fb.calibrate(model, [x]), x)
    assert torch.equal(packed(x), model.eval()(x))


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_looking_at_shape_and_type_is_no_reading(look: Read) -> None:
    model, x = Reader(look), torch.randn(3, 8)
    fb.quantize(model, WEIGHTS, verbose=False)
    with pytest.warns(UserWarning, match=r"1 layers: \['table'\]"):  # it is unused
        fb.calibrate(model, [x])
    fb.pack(model, x)


class Tied(nn.Module):
    """An embedding and a head with one weight [6, 4]; the head is called, or its product is written out."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.embed, self.head, self.functional = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False), functional
        self.head.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        return F.linear(x, self.embed.weight) if self.functional else self.head(x)


@pytest.mark.parametrize("packed", [False, True])
def test_a_tied_weight_may_be_used_by_the_layers_that_own_it_and_by_no_one_else(packed: bool) -> None:
    index = torch.tensor([[1, 2, 5]])

    def read(functional: bool) -> set[str]:
        model = fb.quantize(Tied(functional), WEIGHTS, verbose=False)
        model = fb.pack(model) if packed else model
        with Watch(quantized_layers(model)) as watch:
            model(index)
        return watch.read

    assert read(functional=False) == set()
    assert "embed" in read(functional=True)


def test_the_queries_of_detr_are_refused() -> None:
    pytest.importorskip("transformers")
    model, batch = ZOO["transformers:detr"]()
    with warnings.catch_warnings(), pytest.raises(QuantizationError, match="'model.query_position_embeddings'"):
        warnings.simplefilter("error")
        fb.calibrate(fb.quantize(model, WEIGHTS, verbose=False), [batch])
    assert not call(model, batch)["logits"].isnan().any()


def small() -> nn.Module:
    plan = LayerPlan(TensorPlan(4), TensorPlan(4, symmetric=False))
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    return fb.quantize(model, Plan((("*", plan),)), verbose=False)


def test_errors_of_the_first_training_step_name_the_layer() -> None:
    model, x = small(), torch.randn(5, 3)
    with torch.no_grad():
        model[0].bias[1] = torch.nan
    with pytest.raises(QuantizationError, match=r"^input of layer '1': 5 of 15 values are NaN"):
        model.train()(x)
    state = {k: v for k, v in small().state_dict().items() if "quantizer" not in k}
    state["1.weight"][0, 0] = torch.inf
    model = small()
    model.load_state_dict(state, strict=False)  # a float checkpoint: ranges are taken anew
    with pytest.raises(QuantizationError, match=r"^weight of layer '1': 1 of 6 values are NaN"):
        model.train()(x)
    with pytest.raises(QuantizationError, match=r"^weight of layer '1': 1 of 6 values are NaN"):
        fb.pack(model)


def test_a_missing_range_names_the_layer() -> None:
    with pytest.raises(QuantizationError, match=r"^input of layer '0': this quantizer has no range yet"):
        small().eval()(torch.randn(5, 3))
