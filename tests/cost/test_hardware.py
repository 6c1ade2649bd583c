"""Hardware descriptions: the paper's points, sums by hand, and what a bad file says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from fewbits.cost import (
    Hardware,
    LayerShape,
    ModelShape,
    hardware_cost,
    hardware_names,
    layer_energies,
    layer_energy,
    layer_latency,
    model_shape,
    plan_cycles,
    weight_cycles,
)
from fewbits.cost.hardware import FOLDER
from fewbits.errors import HardwareError, QuantizationError
from fewbits.layers import quantize
from fewbits.plan import LayerPlan, Plan, TensorPlan
from fewbits.recipes.models import named_model

LAYER = LayerShape("conv", "Conv2d", (4, 3, 3, 3), macs=1000, input_elements=80)
SHAPE = ModelShape((LAYER, LayerShape("fc", "Linear", (10, 8), macs=3000, input_elements=8)), ran=True)
ABSMAX: dict[str, Any] = {"quantizer": "ste", "granularity": "channel", "range": "minmax"}


def absmax(bits: int) -> TensorPlan:
    return TensorPlan(bits, **ABSMAX, options={"narrow": True})


def a8(bits: int) -> LayerPlan:
    return LayerPlan(absmax(bits), TensorPlan(8))


def changed(tmp_path: Path, name: str, **fields: Any) -> Path:
    """Write a ready description with fields of its engine replaced, or dropped where None."""
    data = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    data["engine"] = {k: v for k, v in (data["engine"] | fields).items() if v is not None}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture
def linear(tmp_path: Path) -> Hardware:
    return Hardware.load(changed(tmp_path, "shift_add", cycles_from="linear"))


def test_the_papers_energy_points(linear: Hardware) -> None:
    ratios = {bits: hardware_cost(Plan((("*", a8(bits)),)), SHAPE, linear).energy_ratio for bits in (2, 4, 6, 8)}
    assert ratios == pytest.approx({2: 0.750, 4: 0.862, 6: 0.974, 8: 1.086}, abs=1e-9)


def test_the_papers_area() -> None:
    found = hardware_cost(Plan((("*", a8(2)),)), SHAPE, Hardware.load("shift_add"), {"conv": 1.0, "fc": 1.0})
    assert found.mac_area == 1635.4 and found.area_ratio == pytest.approx(1 - 0.2225, abs=1e-4)


def test_the_papers_mixed_point(linear: Hardware) -> None:
    """0.767 of INT8's energy is 2.30 bits, weighed by MACs, and 1.2 times its latency (the paper: 1.175)."""
    shape = ModelShape(
        (LayerShape("a", "Linear", (1, 1), macs=850), LayerShape("b", "Linear", (1, 1), macs=150)), ran=True
    )
    found = hardware_cost(Plan((("a", a8(2)), ("b", a8(4)))), shape, linear)
    assert found.energy_ratio == pytest.approx(0.767, abs=5e-4)
    assert found.latency_ratio == pytest.approx(1.2, abs=0.02)


def test_resnet34_at_8_bits_takes_four_times_the_cycles_of_int8(linear: Hardware) -> None:
    model, example = named_model("torchvision:resnet34", input_shape=(3, 32, 32))
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight)
    plan, shape = Plan((("*", a8(8)),)), model_shape(model, example)
    measured = hardware_cost(plan, shape, Hardware.load("shift_add"), plan_cycles(model, plan, sample=1 << 13))
    assert 4.0 <= measured.latency_ratio <= 4.2
    assert hardware_cost(plan, shape, linear).latency_ratio == pytest.approx(4.2)


def test_resnet50_has_the_layers_and_the_bytes_of_the_paper() -> None:
    model, _ = named_model("torchvision:resnet50")
    shape = model_shape(model)
    assert len(shape.layers) == 54 and shape.numel == 25_502_912
    assert shape.numel / 2**20 == pytest.approx(24.3, abs=0.05)
    assert {layer.kind for layer in shape.layers} == {"Conv2d", "Linear"}


def test_energy_and_latency_of_a_layer_by_hand(tmp_path: Path) -> None:
    hardware, plan = Hardware.load("shift_add"), a8(4)
    energy = layer_energies(LAYER, plan, hardware, 1.5)
    assert energy.compute == pytest.approx(1000 * (0.1914 + 0.0336 * 1.5) / 1e6)
    assert energy.memory == pytest.approx((108 * 4 / 32 + 80 * 8 / 32) * 5 / 1e6)
    assert layer_energy(LAYER, plan, hardware, 1.5) == energy.total == energy.compute + energy.memory
    assert layer_latency(LAYER, plan, hardware, 1.5) == pytest.approx(1e3 * 1500 / (256 * 600e6))
    cpu = Hardware.load("cpu")
    assert layer_latency(LAYER, plan, cpu) == pytest.approx(1e3 * max(1000 / 192e9, 54 / 25.6e9))
    assert layer_energies(LAYER, plan, cpu).memory == pytest.approx((54 * 640 + 80 * 5) / 4 / 1e6)


def test_the_rows_add_up_and_say_what_bounds_them() -> None:
    plan, cycles = Plan((("conv", a8(4)), ("fc", a8(2)))), {"conv": 2.0, "fc": 1.25}
    for name in hardware_names():
        hardware = Hardware.load(name)
        found = hardware_cost(plan, SHAPE, hardware, cycles)
        for row, layer, own in zip(found.layers, SHAPE.layers, (a8(4), a8(2))):
            assert row.compute_energy + row.memory_energy == layer_energy(layer, own, hardware, cycles[layer.name])
            assert row.latency == layer_latency(layer, own, hardware, cycles[layer.name])
            assert row.bound == ("compute" if row.latency == row.compute_latency else "memory")
        assert found.latency == sum(row.latency for row in found.layers)
    assert hardware_cost(plan, SHAPE, Hardware.load("shift_add"), cycles).cycles == 2 * 1000 + 1.25 * 3000
    once = replace(SHAPE.layers[1], macs=80)  # each weight is used once
    bounds = [row.bound for row in hardware_cost(plan, ModelShape((LAYER, once)), Hardware.load("cpu")).layers]
    assert bounds == ["compute", "memory"]


def test_what_is_not_8_bits_takes_its_own_way() -> None:
    mac = Hardware.load("int8_mac")
    assert hardware_cost(Plan((("*", a8(8)),)), SHAPE, mac).energy_ratio == pytest.approx(1)
    one = ModelShape((LAYER,), ran=True)
    float_weight = hardware_cost(Plan(()), one, mac)
    assert float_weight.compute_energy == pytest.approx(1000 * 4.6 / 1e6) and float_weight.cycles == 1000
    wide = hardware_cost(Plan((("*", LayerPlan(absmax(8), TensorPlan(16))),)), one, mac)
    assert wide.cycles == 2000 and wide.memory_energy == pytest.approx((108 + 160) / 4 * 5 / 1e6)
    float_input = hardware_cost(Plan((("*", LayerPlan(absmax(8))),)), one, mac)
    assert float_input == hardware_cost(Plan((("*", a8(8)),)), one, mac), "fed as 8 bits"
    sparse = LayerPlan(replace(absmax(4), sparsity="2:4"), TensorPlan(8))
    assert hardware_cost(Plan((("*", sparse),)), one, mac).latency_ratio == pytest.approx(0.5)


def test_products_of_two_activations_go_in_like_weights(linear: Hardware) -> None:
    layer = LayerShape("attention", "MultiheadAttention", (), operand_macs=100, heads=2)
    plan = LayerPlan(operands=TensorPlan(4))
    assert layer_latency(layer, plan, Hardware.load("shift_add")) == pytest.approx(1e3 * 210 / (256 * 600e6))
    assert layer_energy(layer, plan, linear) == pytest.approx(100 * (0.1914 + 4 * 0.0168) / 1e6)


def test_cycles_are_those_of_the_codes() -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    model[0].weight.data = torch.tensor([[1.0, -1.0, 3.0, 7.0]])  # of 4 bits: 1, 1111, 11, 111
    assert weight_cycles(model, absmax, [4]) == {"0": {4: (1 + 4 + 2 + 3) / 4}}
    plan = Plan((("0", a8(4)),))
    assert plan_cycles(model, plan) == {"0": 2.5}
    assert plan_cycles(model, Plan(())) == {}
    quantize(model, plan, verbose=False)
    model[0].weight_quantizer.scale.fill_(7.0)  # trained to other codes: 0, 0, 0, 1
    assert plan_cycles(model, plan) == {"0": 1.0}
    assert weight_cycles(model, absmax, [8])["0"][8] == pytest.approx((2 + 5 + 5 + 7) / 4)  # 18, -18, 54, 127


def test_pruned_weights_take_no_cycle() -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    model[0].weight.data = torch.tensor([[0.1, 0.2, -1.0, 7.0]])
    plan = Plan((("0", LayerPlan(replace(absmax(4), sparsity="2:4"))),))
    assert plan_cycles(model, plan) == {"0": (4 + 3) / 2}


def test_measured_cycles_that_are_not_there_are_an_error() -> None:
    with pytest.raises(HardwareError, match="layer 'conv': .*needs the mean cycles of its weight: pass those of"):
        hardware_cost(Plan((("*", a8(4)),)), SHAPE, Hardware.load("shift_add"), {"fc": 1.0})
    with pytest.raises(HardwareError, match="need MACs: take the shape with an example"):
        hardware_cost(Plan(()), ModelShape((replace(LAYER, macs=0),)), Hardware.load("cpu"))
    model = nn.Sequential(nn.Linear(4, 1))
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match="weight of layer '0': .*NaN"):
        weight_cycles(model, absmax, [4])


def test_a_width_that_the_hardware_lacks_is_an_error() -> None:
    with pytest.raises(HardwareError, match=r"layer 'conv' needs products of float, this hardware runs \[4, 8, 16\]"):
        layer_energy(LAYER, LayerPlan(absmax(4)), Hardware.load("npu"))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("shift_add", {"clock_mhz": None}, "mine.yaml: the field 'engine.clock_mhz' is missing"),
        ("shift_add", {"base_pj": -0.1}, "engine.base_pj: Input should be greater than or equal to 0, got -0.1"),
        ("int8_mac", {"int8_pj": 0}, "engine.int8_pj: Input should be greater than 0, got 0"),
        ("int8_mac", {"int8_pj": float("inf")}, "engine.int8_pj: .*finite"),
        ("int8_mac", {"int8_pj": "0.3 pJ"}, "engine.int8_pj: .*valid number, got '0.3 pJ'"),
        ("int8_mac", {"int8_pj": "3e-1"}, "engine.int8_pj: .*got '3e-1'; YAML takes that as text: write 0.3"),
        ("int8_mac", {"clock_mhzz": 600}, "unknown field 'engine.clock_mhzz'; did you mean 'clock_mhz'"),
        ("int8_mac", {"count": True}, "engine.count: .*valid integer, got True"),
        ("int8_mac", {"colour": "red"}, "unknown field 'engine.colour'"),
        ("shift_add", {"cycles_from": "guess"}, "engine.cycles_from: .*'measured' or 'linear', got 'guess'"),
        ("int8_mac", {"kind": "abacus"}, "engine.kind must be int8_mac, shift_add or roofline"),
        ("int8_mac", {"kind": None}, "engine.kind must be int8_mac, shift_add or roofline"),
        ("cpu", {"gmacs_per_s": {8: 1.0}}, "must list the same bit widths"),
        ("cpu", {"gmacs_per_s": {8: -1.0, 32: 1}}, "engine.gmacs_per_s.8: Input should be greater than 0"),
        ("cpu", {"gmacs_per_s": {4: 1.0}, "pj_per_mac": {4: 1.0}}, "one of them 8 or more"),
    ],
)
def test_a_bad_file_is_an_error_that_names_file_and_field(
    tmp_path: Path, name: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(HardwareError, match=message) as caught:
        Hardware.load(changed(tmp_path, name, **fields))
    assert "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match="no hardware 'shiftadd'; did you mean 'shift_add'"):
        Hardware.load("shiftadd")
    for text, message in (("engine: [", "cannot read the hardware"), ("- 1", "is a mapping with 'engine'")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(HardwareError, match=message):
            Hardware.load(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("name: x")
    with pytest.raises(HardwareError, match="'engine' is missing; the field 'memory' is missing"):
        Hardware.load(tmp_path / "x.yaml")
