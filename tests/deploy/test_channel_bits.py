"""Channels of different widths, from the plan to the packed file, the ONNX file and the cost."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

import fewbits as fb
from fewbits.cost import code_cycles, layer_bops, model_shape, plan_cycles, size
from fewbits.deploy import code_mismatches
from fewbits.deploy.bits import pack_rows, unpack_rows
from fewbits.deploy.verify import open_session
from fewbits.errors import PackedFileError
from fewbits.layers import describe
from fewbits.plan import LayerPlan, Plan, TensorPlan

WIDTHS = {"0": (2, 8, 3, 4), "3": (4, 2, 2)}


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 9, 3)).eval()


def plan() -> Plan:
    def layer(widths: tuple[int, ...]) -> LayerPlan:
        weight = TensorPlan(max(widths), "maxabs", granularity="channel", channel_bits=widths)
        return LayerPlan(weight, TensorPlan(8, "lsq", symmetric=False))

    return Plan(tuple((name, layer(widths)) for name, widths in WIDTHS.items()))


def quantized() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    made, x = model(), torch.randn(4, 2, 5, 5)
    original = copy.deepcopy(made)
    fb.calibrate(fb.quantize(made, plan(), verbose=False), [x])
    return original, made.eval(), x


def test_rows_are_packed_at_their_own_width() -> None:
    widths = (3, 8, 3, 2)
    rows = torch.stack([torch.randint(1 - 2 ** (b - 1), 2 ** (b - 1), (7,)) for b in widths])
    packed = pack_rows(rows, widths)
    assert packed.numel() == 2 + 6 + 7, "7 codes of 2 bits, 14 of 3, 7 of 8"
    assert torch.equal(unpack_rows(packed, widths, 7), rows.int())
    with pytest.raises(PackedFileError, match="take 15 bytes, the stream has 14"):
        unpack_rows(packed[:-1], widths, 7)


def test_a_plan_reads_back_equal() -> None:
    again = Plan.from_dict(plan().to_dict())
    assert again == plan()
    weight = dict(again)["0"].weight  # type: ignore[union-attr]
    assert weight is not None and weight.mean_bits == 17 / 4 and describe(weight).startswith("4.25 bit maxabs channel")


def test_packed_and_loaded_answer_as_trained(tmp_path: Path) -> None:
    original, trained, x = quantized()
    packed = fb.pack(trained)
    assert torch.equal(packed(x), trained(x)) and code_mismatches(trained, packed) == 0
    fb.save(fb.pack(trained, x), tmp_path / "m.safetensors")
    loaded = fb.load(tmp_path / "m.safetensors", original)
    assert code_mismatches(trained, loaded) == 0
    torch.testing.assert_close(loaded(x), trained(x))


def test_the_cost_is_that_of_the_file() -> None:
    original, trained, x = quantized()
    shape = model_shape(original, x[:1])
    counted = size(plan(), shape)
    packed = fb.pack(trained, x)
    stored = [packed.get_submodule(name).packed.codes.numel() for name in WIDTHS]  # type: ignore[union-attr]
    codes = [sum(-(-w.count(b) * n * b // 8) for b in set(w)) for w, n in zip(WIDTHS.values(), (18, 36))]
    assert stored == codes
    assert counted.average_weight_bits == pytest.approx((18 * 17 + 36 * 8) / (4 * 18 + 3 * 36))
    conv = next(layer for layer in shape.layers if layer.name == "0")
    assert layer_bops(conv, dict(plan())["0"]) == 9 * 18 * 17 * 8


def test_cycles_count_each_channel_at_its_width() -> None:
    codes = torch.tensor([[-1, 1], [-1, 1]])
    assert code_cycles(codes, torch.tensor([[2], [8]])).tolist() == [[2, 1], [8, 1]]
    _, trained, _ = quantized()
    codes = trained.get_submodule("3").weight_quantizer.encode(trained.get_submodule("3").weight).values  # type: ignore
    by_hand = torch.cat([code_cycles(codes[i], b) for i, b in enumerate(WIDTHS["3"])]).double().mean()
    assert plan_cycles(trained, plan())["3"] == pytest.approx(float(by_hand))
    assert set(plan_cycles(model(), plan(), sample=40)) == set(WIDTHS)


@pytest.mark.parametrize("mode", ["fastest", "smallest"])
def test_onnx_answers_as_packed(mode: str, tmp_path: Path) -> None:
    _, trained, x = quantized()
    packed = fb.pack(trained, x)
    report = fb.export_onnx(packed, tmp_path / "m.onnx", x, mode=mode)
    got = torch.from_numpy(open_session(tmp_path / "m.onnx")((x,)))
    with torch.no_grad():
        torch.testing.assert_close(got, packed(x), atol=1e-4, rtol=1e-4)
    kinds = {"0": "INT2+INT4+INT8", "3": "INT2+INT4"} if mode == "smallest" else dict.fromkeys(WIDTHS, "INT8")
    assert report.weight_types == kinds


def test_onnx_holds_channels_by_their_widths(tmp_path: Path) -> None:
    _, trained, x = quantized()
    packed = fb.pack(trained, x)
    fb.export_onnx(packed, tmp_path / "m.onnx", x, mode="smallest")
    kinds = {2: TensorProto.INT2, 4: TensorProto.INT4, 8: TensorProto.INT8}
    found = dict.fromkeys(kinds, 0)
    for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer:
        for bits, kind in kinds.items():
            if tensor.data_type == kind and len(tensor.dims) > 1:
                found[bits] += math.prod(tensor.dims)
    assert found == {2: 18 + 2 * 36, 4: 2 * 18 + 36, 8: 18}, "weights of each type"
