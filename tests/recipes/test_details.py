from __future__ import annotations

import pytest
import torch
from torch import nn

from fewbits.allocate import uniform_plan
from fewbits.cost import model_shape, size
from fewbits.layers import calibrate, quantize, quantized_layers
from fewbits.recipes.details import histograms, layer_rows, not_quantized, output_sqnr
from fewbits.tasks.models import ReferenceCNN

IMAGES = torch.linspace(-1, 1, 6 * 64).reshape(6, 1, 8, 8)


def quantized(bits: int, act_bits: int | None = 8) -> nn.Module:
    torch.manual_seed(0)
    model = ReferenceCNN(width=4)
    quantize(model, uniform_plan(model, bits, act_bits, first_last=None), verbose=False)
    return calibrate(model, [IMAGES]).train()


def test_rows_hold_what_the_plan_and_the_cost_say() -> None:
    model = quantized(3)
    plan, shape = uniform_plan(model, 3, 8, first_last=None), model_shape(model, IMAGES[:1])
    rows = {row["name"]: row for row in layer_rows(model, shape, size(plan, shape), IMAGES)}
    assert list(rows) == list(shape.names)
    conv = rows["features.3"]
    assert (conv["kind"], conv["weight_bits"], conv["input_bits"]) == ("Conv2d", 3, 8)
    assert (conv["parameters"], conv["macs"]) == (8 * 4 * 9, 8 * 4 * 9 * 16)
    assert conv["bytes"] == 8 * 4 * 9 * 3 // 8 + 8 * 4 + 8  # codes, scales of channels, range of the input
    assert 0 < conv["weight_error"] < 0.1
    assert {row["kind"] for row in not_quantized(model)} == {"BatchNorm2d"}


def test_errors_fall_with_the_bits() -> None:
    plan, shape = None, None
    errors, sqnr = [], []
    for bits in (2, 4, 8):
        model = quantized(bits)
        plan, shape = uniform_plan(model, bits, 8, first_last=None), model_shape(model, IMAGES[:1])
        rows = layer_rows(model, shape, size(plan, shape), IMAGES)
        errors.append(sum(row["weight_error"] for row in rows))
        sqnr.append(min(row["sqnr_db"] for row in rows))
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 0
    assert sqnr[0] < sqnr[1] < sqnr[2]


def test_output_errors_leave_the_model_as_it_was() -> None:
    model = quantized(2)
    state = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    output_sqnr(model, IMAGES)
    assert model.training and all(layer.mode == "quantize" for layer in quantized_layers(model).values())
    assert all(not layer._forward_hooks for layer in quantized_layers(model).values())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


@pytest.mark.parametrize(("bits", "grid"), [(1, [-1, 1]), (2, [-3, -1, 1, 3]), (3, [-4, -3, -2, -1, 0, 1, 2, 3])])
def test_weights_are_shown_in_steps_around_the_codes(bits: int, grid: list[int]) -> None:
    model = quantized(bits)
    found = histograms(model)["features.3"]
    assert found["grid"] == grid
    assert sum(found["counts"]) == 8 * 4 * 9
    assert len(found["edges"]) == len(found["counts"]) + 1
    layer = quantized_layers(model)["features.3"]
    assert layer.weight_quantizer is not None
    weight = layer.weight.detach()
    steps = weight / layer.weight_quantizer.encode(weight).scale[:, None, None, None]
    assert found["edges"][-1] == pytest.approx(float(steps.max()), rel=1e-5)
