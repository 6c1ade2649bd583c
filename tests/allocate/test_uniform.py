"""Uniform plans."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fewbits
from fewbits.allocate import uniform_plan
from fewbits.errors import PlanError, QuantizationError
from fewbits.plan import LayerPlan, Plan


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 9)

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        out: Tensor = self.head(self.attention(x, x, x)[0])
        return out


def resolved(plan: Plan) -> dict[str, LayerPlan]:
    return {name: layer for name, layer in plan if layer is not None}


def bits(plan: Plan) -> list[int | None]:
    return [None if layer.weight is None else layer.weight.bits for layer in resolved(plan).values()]


def test_one_rule_a_layer_and_eight_bits_at_both_ends() -> None:
    plan = uniform_plan(Net(), 3, 4)
    layers = resolved(plan)
    assert list(layers) == ["embed", "attention", "attention.out_proj", "head"]
    assert bits(plan) == [8, 3, 3, 8]
    assert layers["embed"].input is None  # an index
    assert layers["head"].input is not None and layers["head"].input.bits == 8
    assert [layers["attention"].input, layers["attention"].operands] == [layers["attention.out_proj"].input] * 2
    for layer in layers.values():
        assert layer.weight is not None and layer.weight.symmetric and layer.weight.granularity == "channel"
        assert layer.input is None or (not layer.input.symmetric and layer.input.granularity == "tensor")


def test_the_ends_never_get_fewer_bits_than_the_rest() -> None:
    layers = resolved(uniform_plan(Net(), 8, 16, first_last=4))
    assert layers["head"].weight is not None and layers["head"].weight.bits == 8
    assert layers["head"].input is not None and layers["head"].input.bits == 16
    assert bits(uniform_plan(Net(), 3, first_last=None)) == [3, 3, 3, 3]


def test_tied_ends_stay_tied() -> None:
    model = Net()
    model.head.weight = model.embed.weight
    model.tail = nn.Linear(8, 8)  # type: ignore[assignment]
    assert bits(uniform_plan(model, 2)) == [8, 2, 2, 8, 8]


def test_options_arrive() -> None:
    plan = uniform_plan(
        Net(), 4, 4, quantizer="ste", act_quantizer="lsq+", granularity="block", block=4, range="minmax"
    )
    layer = resolved(plan)["attention"]
    assert layer.weight is not None and layer.input is not None
    assert (layer.weight.quantizer, layer.weight.block, layer.weight.range) == ("ste", 4, "minmax")
    assert (layer.input.quantizer, layer.input.range) == ("lsq+", "minmax")


def test_the_plan_fits_the_model_and_tells_where_it_comes_from() -> None:
    model, index = Net(), torch.tensor([[1, 2, 3]])
    plan = uniform_plan(model, 4, 8)
    assert plan.decided_from["method"] == "uniform" and plan.decided_from["weight_bits"] == 4
    assert Plan.from_dict(plan.to_dict()) == plan
    fewbits.calibrate(fewbits.quantize(model, plan, verbose=False), [index])
    assert torch.isfinite(model(index)).all()


@pytest.mark.parametrize("wrong", [0, 9, 2.5, True])
def test_bits_outside_the_menu(wrong: int) -> None:
    with pytest.raises(PlanError, match="weight_bits must be one of"):
        uniform_plan(Net(), wrong)
    with pytest.raises(PlanError, match="act_bits must be one of"):
        uniform_plan(Net(), 4, wrong)
    with pytest.raises(PlanError, match="first_last must be one of"):
        uniform_plan(Net(), 4, first_last=wrong)


def test_a_model_without_quantizable_layers() -> None:
    with pytest.raises(QuantizationError, match="no quantizable layer"):
        uniform_plan(nn.Sequential(nn.ReLU()), 4)


def test_two_bit_weights_take_the_odd_grid_of_the_uniform_quantizers_only() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    for bits, quantizer, options in ((2, "lsq", {"odd": True}), (2, "denoise", {}), (3, "lsq", {})):
        plan = uniform_plan(model, bits, quantizer=quantizer)
        middle = dict(plan.rules)["1"]
        assert middle is not None and middle.weight is not None and dict(middle.weight.options) == options


def test_dynamic_inputs_do_not_let_samples_see_each_other() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    fewbits.quantize(model, uniform_plan(model, 2, 2, first_last=None, quantizer="denoise"), verbose=False)
    x = torch.randn(4, 3, 8, 8)
    x[3] *= 100.0
    model.eval()
    torch.testing.assert_close(model(x)[:3], model(x[:3]))
