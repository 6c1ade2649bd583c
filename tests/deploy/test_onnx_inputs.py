"""ONNX forms of learned clips, learned thresholds and folded fusions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import fewbits as fb
from fewbits import FusionSettings, LayerPlan, Plan, TensorPlan
from fewbits.deploy import calibrate_fusion, run_in_integers
from fewbits.deploy.onnx_inputs import EmitRequantize
from fewbits.deploy.verify import open_session
from fewbits.layers import balance_fusion
from fewbits.quantizers import Requantize, make_quantizer
from tests.layers.fusion_models import UNet, settled


def net(quantizer: str, *, signed: bool = False, bits: int = 3) -> tuple[nn.Module, torch.Tensor]:
    x = torch.randn(8, 6, 9, 9) if signed else torch.rand(8, 6, 9, 9)
    model = nn.Sequential(nn.Conv2d(6, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))
    plan = Plan(
        (("*", LayerPlan(TensorPlan(4, granularity="channel"), TensorPlan(bits, quantizer, symmetric=signed))),)
    )
    model = fb.calibrate(fb.quantize(model, plan, verbose=False), [x])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(5):  # thresholds and clips that are no longer what they were
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval(), x


@pytest.mark.parametrize("mode", ["fastest", "smallest"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("quantizer", ["pact", "n2uq"])
def test_learned_clips_and_thresholds(quantizer: str, signed: bool, mode: str, tmp_path: Path) -> None:
    model, x = net(quantizer, signed=signed)
    packed = fb.pack(model)
    assert torch.equal(packed(x), model(x))
    fb.export_onnx(packed, tmp_path / "m.onnx", x, mode=mode)
    got = torch.from_numpy(open_session(tmp_path / "m.onnx")((x,)))
    assert float((got - packed(x)).abs().median()) < 1e-5
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node)
    assert kinds["GreaterOrEqual"] == (14 if quantizer == "n2uq" else 0)
    fb.save(packed, tmp_path / "m.safetensors")
    again = fb.load(tmp_path / "m.safetensors", nn.Sequential(*[_plain(m) for m in model]))
    assert torch.equal(again(x), packed(x))


def _plain(layer: nn.Module) -> nn.Module:
    if not isinstance(layer, nn.Conv2d):
        return nn.ReLU()
    return nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size[0])


@pytest.mark.parametrize("quantizer", ["pact", "n2uq"])
def test_codes_are_multiplied_as_integers(quantizer: str) -> None:
    model, x = net(quantizer)
    packed = fb.pack(model)
    want = packed(x)
    assert run_in_integers(packed) == ["0", "2"]
    torch.testing.assert_close(packed(x), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["fastest", "smallest"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_folded_fusion(bits: int, mode: str, tmp_path: Path) -> None:
    x = torch.randn(8, 3, 16, 16)
    model = settled(UNet, x)
    balance_fusion(model, x, "auto", FusionSettings("fixed", gains=(1, 3)))
    plan = Plan((("*", LayerPlan(TensorPlan(4, granularity="channel"), TensorPlan(bits))),))
    fb.calibrate(fb.quantize(model, plan, verbose=False), [x])
    calibrate_fusion(model, [x])
    fb.fold_fusion(model, [x])
    packed = fb.pack(model, x)
    fb.export_onnx(packed, tmp_path / "m.onnx", x, mode=mode)
    got = torch.from_numpy(open_session(tmp_path / "m.onnx")((x,)))
    assert float((got - packed(x)).abs().median()) < 1e-4
    run_in_integers(packed)
    assert float((packed(x) - got).abs().median()) < 1e-4


@pytest.mark.parametrize(
    ("shift", "window", "integer"),
    [(0, 0, True), (5, 0, True), (12, 4, True), (-99, 0, True), (300, 0, False), (-300, 0, False), (124, 0, False)],
)
def test_the_window_of_codes_leaves_the_zero_point_room(shift: int, window: int, integer: bool) -> None:
    old = make_quantizer(TensorPlan(4))
    old.calibrate(torch.randn(100))
    new = make_quantizer(TensorPlan(4, "requantize"))
    assert isinstance(new, Requantize)
    new.take_over(old, torch.ones(1), torch.ones(()), torch.zeros(()))  # type: ignore[arg-type]
    new.shift.fill_(shift)
    emit = EmitRequantize(new, integer=True)
    assert emit.integer is integer
    if integer:
        assert int(emit.bottom) == window and int(emit.top) == window + 15
        assert int(emit.point) == window + 8 and int(emit.moved) == window + 8 - shift
    else:  # the same arithmetic in float
        x = 20 * torch.randn(50) + shift * float(new.scale)
        assert torch.equal(emit(x), new(x))
