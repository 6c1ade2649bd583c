"""Biases aligned to the units of integer engines: a tiny move of the trained model, and then the engine follows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fewbits as fb
from fewbits import LayerPlan, Plan, TensorPlan
from fewbits.deploy.align import bias_unit
from fewbits.deploy.verify import open_session
from fewbits.errors import QuantizationError
from tests.deploy.models import Residual, plan_for, quantized, randomize

EIGHT = TensorPlan(8, "ste", symmetric=False)


def trained(bits: int = 8, act: int = 4) -> tuple[nn.Module, torch.Tensor]:
    x = torch.randn(64, 3, 12, 12)
    plan = plan_for(bits, act).override(("bn2", LayerPlan(output=EIGHT)))
    return quantized(randomize(Residual()), plan, [x]), x


def off_grid(packed: nn.Module) -> torch.Tensor:
    """Return how far the biases of the convolutions are from whole units, in units."""
    parts = []
    for name in ("conv1", "conv2", "shortcut"):
        layer = packed.get_submodule(name)
        units = layer.bias.double() / bias_unit(layer.packed.get(), layer.input_quantizer)
        parts.append((units - units.round()).abs())
    return torch.cat(parts)


def test_biases_become_whole_units_by_at_most_half_a_unit() -> None:
    model, x = trained()
    before = fb.pack(model, x)
    moved = fb.align_biases(model, x)
    after = fb.pack(model, x)
    assert set(moved) == {"conv1", "conv2", "shortcut"}
    assert off_grid(before).max() > 0.3 and off_grid(after).max() < 0.01
    for name, largest in moved.items():
        layer = before.get_submodule(name)
        unit = bias_unit(layer.packed.get(), layer.input_quantizer)
        change = (after.get_submodule(name).bias - layer.bias).abs().double()
        assert (change <= 0.5 * unit * (1 + 1e-4)).all() and change.max() == pytest.approx(largest, rel=1e-3)


def test_the_runtime_then_follows_exactly(tmp_path: Path) -> None:
    x = torch.randn(64, 3, 12, 12)
    eight, four = TensorPlan(8, granularity="channel"), TensorPlan(4, symmetric=False)
    plan = plan_for(8, 4).override(("3", LayerPlan(eight, four, output=EIGHT)))
    float_model = randomize(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)))
    model = quantized(float_model, plan, [x])

    def equal_answers() -> float:
        packed = fb.pack(model, x)
        fb.export_onnx(packed, tmp_path / "m.onnx", x)
        with torch.no_grad():
            difference = torch.from_numpy(open_session(tmp_path / "m.onnx")((x,))) - packed(x)
        return float((difference.flatten(1).abs().amax(1) < 1e-4).float().mean())

    before = equal_answers()
    fb.align_biases(model, x)
    assert before < 0.7 < 0.95 < equal_answers()


def test_it_is_idempotent_and_keeps_the_mode_of_each_module() -> None:
    model, x = trained()
    model.train()
    model.bn1.eval()
    statistics = model.bn2.running_mean.clone()
    first = fb.align_biases(model, x)
    assert model.training and not model.bn1.training and torch.equal(statistics, model.bn2.running_mean)
    again = fb.align_biases(model, x)
    assert all(again[name] < 0.01 * first[name] for name in first)


def test_what_engines_run_in_float_stays() -> None:
    x = torch.randn(2, 3, 12, 12)
    plan = plan_for(4, None).override(("shortcut", LayerPlan(TensorPlan(4), TensorPlan(16))))
    model = quantized(randomize(Residual()), plan, [x])
    state = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    assert fb.align_biases(model, x) == {}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


def test_a_gain_of_zero_leaves_the_bias() -> None:
    model, x = trained()
    nn.init.zeros_(model.bn1.weight)
    bias = model.bn1.bias.clone()
    fb.align_biases(model, x)
    assert torch.equal(bias, model.bn1.bias)


def test_a_packed_model_is_refused() -> None:
    model, x = trained()
    with pytest.raises(QuantizationError, match="'conv1' is packed"):
        fb.align_biases(fb.pack(model), x)


@pytest.mark.parametrize("groups", [2, 4])
def test_a_transposed_convolution_with_groups_is_left_alone(groups: int) -> None:
    x, plan = torch.randn(2, 4, 5, 5), Plan((("0", LayerPlan(TensorPlan(4, granularity="channel"), EIGHT)),))
    model = quantized(nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=groups)), plan, [x])
    assert fb.align_biases(model, x) == {}
    whole = quantized(nn.Sequential(nn.ConvTranspose2d(4, 8, 3)), plan, [x])
    assert set(fb.align_biases(whole, x)) == {"0"}


def test_odd_activations_and_a_layer_that_nothing_reaches_are_left_alone() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.unused = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.odd(x)

    x, four = torch.randn(2, 2, 3, 3), TensorPlan(4, granularity="channel")
    plan = Plan((("odd", LayerPlan(four, TensorPlan(1))), ("unused", LayerPlan(four, EIGHT))))
    model = fb.quantize(Two(), plan, verbose=False)
    with pytest.warns(UserWarning, match="unused"):
        fb.calibrate(model, [x])
    assert fb.align_biases(model, x) == {}
