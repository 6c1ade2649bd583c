import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import fewbits as fb
from fewbits import LayerPlan, Plan, TensorPlan
from fewbits.deploy import export_float, run_in_integers
from fewbits.deploy.onnx_nodes import refine_for_bias
from fewbits.deploy.verify import open_session
from fewbits.errors import ExportError
from fewbits.quantizers import Uniform, make_quantizer
from tests.deploy.models import Residual, plan_for, quantized, randomize

EIGHT = TensorPlan(8, "ste", symmetric=False)


@pytest.fixture(scope="module")
def packed() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 12, 12)
    plan = plan_for(4, 4).override(("bn2", LayerPlan(output=EIGHT)))
    return fb.pack(quantized(randomize(Residual()), plan, [x]), x), x


@pytest.mark.parametrize("mode", ["fastest", "smallest"])
def test_the_runtime_gives_the_same_answers(packed: tuple[nn.Module, torch.Tensor], mode: str, tmp_path: Path) -> None:
    model, x = packed
    report = fb.export_onnx(model, tmp_path / "m.onnx", x[:1], mode=mode)
    assert report.file_bytes == (tmp_path / "m.onnx").stat().st_size
    seen = fb.verify(tmp_path / "m.onnx", model, [x[:10], x[10:]], min_agreement=90)
    assert seen.samples == 16
    # in mode smallest the engine multiplies 4-bit linears with activations that it rounds to 8 bits
    assert seen.median_abs_diff < (1e-4 if mode == "fastest" else 1e-2)
    assert seen.latency_ms > 0
    kinds = set(report.weight_types.values())
    assert kinds == ({"INT8"} if mode == "fastest" else {"INT4"})


def test_activations_are_unsigned_and_shared_by_their_consumers(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x)

    x = torch.randn(4, 3, 8, 8)
    plan = Plan((("*", LayerPlan(TensorPlan(4, granularity="channel"), TensorPlan(4, "ste"))),))
    model = fb.calibrate(fb.quantize(Two(), plan, verbose=False), [x]).eval()
    fb.export_onnx(fb.pack(model), tmp_path / "m.onnx", x)
    graph = onnx.load(tmp_path / "m.onnx").graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("QuantizeLinear") == 1
    assert operators.count("Clip") == 1
    types = {t.name: t.data_type for t in graph.initializer}
    point = next(node.input[2] for node in graph.node if node.op_type == "QuantizeLinear")
    assert types[point] == onnx.TensorProto.UINT8


@pytest.mark.parametrize(("bits", "outputs", "kind"), [(1, 8, "INT2"), (2, 8, "INT2"), (2, 10, "INT4"), (3, 8, "INT4"),
                                                       (4, 8, "INT4"), (5, 8, "INT8"), (8, 8, "INT8")])  # fmt: skip
def test_weight_only_linears_take_the_narrowest_type_that_is_right(
    bits: int, outputs: int, kind: str, tmp_path: Path
) -> None:
    model = fb.quantize(nn.Sequential(nn.Linear(64, outputs)), plan_for(bits, None), verbose=False).eval()
    packed, x = fb.pack(model), torch.randn(8, 64)
    report = fb.export_onnx(packed, tmp_path / "m.onnx", x)
    assert set(report.weight_types.values()) == {kind}
    got, want = open_session(tmp_path / "m.onnx")((x,)), packed(x).numpy()
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()  # the engine rounds activations to 8 bits


@pytest.mark.parametrize("mode", ["fastest", "smallest"])
@pytest.mark.parametrize("granularity", [{"granularity": "channel"}, {"granularity": "block", "block": 16}])
@pytest.mark.parametrize(
    ("bits", "given", "kind"),
    [
        (2, {"quantizer": "ste", "options": {"odd": True}}, "INT2"),
        (2, {"quantizer": "denoise", "symmetric": False}, "INT2"),
        (4, {"quantizer": "denoise", "symmetric": False}, "INT4"),
        (1, {"quantizer": "denoise", "symmetric": False}, "INT2"),
    ],
)
def test_weights_with_an_offset(
    bits: int, given: dict[str, Any], kind: str, granularity: dict[str, Any], mode: str, tmp_path: Path
) -> None:
    model: nn.Module = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Flatten(1, -1), nn.Linear(40 * 16, 12))
    x = torch.randn(4, 3, 6, 6)
    plan = Plan((("*", LayerPlan(TensorPlan(bits, **granularity, **given))),))
    packed = fb.pack(fb.quantize(model, plan, verbose=False))
    with torch.no_grad():
        want = packed(x)
    report = fb.export_onnx(packed, tmp_path / "m.onnx", x, mode=mode)
    got = torch.from_numpy(open_session(tmp_path / "m.onnx")((x,)))
    assert (got - want).abs().max() < 0.02 * want.abs().max()  # weight-only linears: activations in 8 bits
    if mode == "smallest":
        assert set(report.weight_types.values()) == {kind}


@pytest.mark.parametrize("mode", ["fastest", "smallest"])
@pytest.mark.parametrize("quantizer", ["denoise", "dynamic"])
@pytest.mark.parametrize(("act", "symmetric"), [(1, False), (4, False), (4, True)])
def test_dynamic_activations(act: int, symmetric: bool, quantizer: str, mode: str, tmp_path: Path) -> None:
    model: nn.Module = nn.Sequential(nn.Conv2d(6, 16, 3), nn.ReLU(), nn.Flatten(2), nn.Linear(16, 12))
    x = torch.randn(4, 6, 6, 6)
    given = {"quantizer": quantizer, "granularity": "block"}
    plan = Plan(
        (
            ("0", LayerPlan(TensorPlan(1, "denoise", granularity="channel", sparsity="1:2"),
                            TensorPlan(act, symmetric=symmetric, block=6, **given))),
            ("3", LayerPlan(TensorPlan(2, granularity="channel", options={"odd": True}, sparsity="2:4"),
                            TensorPlan(act, symmetric=symmetric, block=8, **given))),
        )
    )  # fmt: skip
    packed = fb.pack(fb.quantize(model, plan, verbose=False))
    with torch.no_grad():
        want = packed(x)
    fb.export_onnx(packed, tmp_path / "m.onnx", x, mode=mode)
    got = torch.from_numpy(open_session(tmp_path / "m.onnx")((x[:3],)))
    assert ((got - want[:3]).abs() < 0.02 * want.abs().max()).float().mean() > 0.98  # but for codes on a boundary


def test_larger_codes_are_the_same_weight_and_round_the_bias_finer() -> None:
    weight, bias = torch.randn(6, 5, 3, 3), torch.randn(6)
    quantizer = make_quantizer(TensorPlan(3, "ste", granularity="channel"), shape=(6, 5, 3, 3))
    quantizer.calibrate(weight)
    activation = make_quantizer(TensorPlan(4, "ste", symmetric=False))
    activation.calibrate(torch.rand(1000))
    assert isinstance(activation, Uniform)
    codes = quantizer.encode(weight)
    refined = refine_for_bias(codes, bias, activation)
    torch.testing.assert_close(refined.decode(), codes.decode(), rtol=1e-6, atol=0)
    assert refined.values.abs().max() <= 127

    def error(scale: torch.Tensor) -> torch.Tensor:
        unit = scale * activation.affine()[0]
        return ((bias / unit).round() * unit - bias).abs().max()

    assert error(refined.scale) < 0.1 * error(codes.scale)


def test_export_leaves_the_log_level_of_pytorch_as_it_was(
    packed: tuple[nn.Module, torch.Tensor], tmp_path: Path
) -> None:
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    fb.export_onnx(packed[0], tmp_path / "m.onnx", packed[1])
    assert logger.level == before


def test_what_cannot_be_exported_is_an_error(packed: tuple[nn.Module, torch.Tensor], tmp_path: Path) -> None:
    model, x = packed
    with pytest.raises(ExportError, match="mode must be one of"):
        fb.export_onnx(model, tmp_path / "m.onnx", x, mode="tiny")
    with pytest.raises(ExportError, match=r"call fewbits\.pack"):
        fb.export_onnx(Residual(), tmp_path / "m.onnx", x)


def test_a_file_that_gives_other_answers_fails_verification(
    packed: tuple[nn.Module, torch.Tensor], tmp_path: Path
) -> None:
    model, x = packed
    export_float(randomize(Residual()), tmp_path / "other.onnx", x)
    with pytest.raises(ExportError, match=r"other\.onnx failed verification: .* of 16 samples"):
        fb.verify(tmp_path / "other.onnx", model, [x])
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"cannot load .*broken\.onnx"):
        fb.verify(tmp_path / "broken.onnx", model, [x])
    with pytest.raises(ExportError, match="at least one batch"):
        fb.verify(tmp_path / "other.onnx", model, [])


def test_sparse_odd_codes_of_eight_bits_fit_no_type(tmp_path: Path) -> None:
    x = torch.randn(3, 8)

    def export(bits: int) -> None:
        weight = TensorPlan(bits, "denoise", granularity="channel", sparsity="2:4", options={"odd": True})
        model = fb.quantize(nn.Sequential(nn.Linear(8, 4)), Plan((("0", LayerPlan(weight)),)), verbose=False)
        packed = fb.pack(model)
        fb.export_onnx(packed, tmp_path / "m.onnx", x)
        with torch.no_grad():
            got = torch.from_numpy(open_session(tmp_path / "m.onnx")((x,)))
            torch.testing.assert_close(got, packed(x), rtol=0, atol=0.02)  # the engine rounds x to 8 bits

    export(7)
    with pytest.raises(ExportError, match="-255..255 and 0 fit no weight type"):
        export(8)


def test_a_model_that_runs_in_integers_exports_like_the_packed_one(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 5, 5)
    plan = Plan((("*", LayerPlan(TensorPlan(4, granularity="channel"), TensorPlan(4, symmetric=False))),))
    packed = fb.pack(quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 4)), plan, [x]))
    fb.export_onnx(packed, tmp_path / "packed.onnx", x)
    assert run_in_integers(packed) == ["0", "2"]
    fb.export_onnx(packed, tmp_path / "integers.onnx", x)
    want, got = (open_session(tmp_path / f"{name}.onnx")((x,)) for name in ("packed", "integers"))
    assert np.array_equal(want, got)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_is_exported(packed: tuple[nn.Module, torch.Tensor], tmp_path: Path) -> None:
    model, x = packed
    fb.export_onnx(copy.deepcopy(model).cuda(), tmp_path / "m.onnx", x.cuda())
    fb.verify(tmp_path / "m.onnx", model, [x], min_agreement=90)


def test_a_list_holds_positional_arguments_as_for_calibrate(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.sub(self.a(x), self.b(y))

    batch = [torch.randn(3, 4), torch.randn(3, 4)]
    packed = fb.pack(quantized(Sum(), Plan((("*", LayerPlan(TensorPlan(8), EIGHT)),)), [batch]), batch)
    fb.export_onnx(packed, tmp_path / "m.onnx", batch)
    got = torch.from_numpy(open_session(tmp_path / "m.onnx")(tuple(batch)))
    torch.testing.assert_close(got, packed(*batch), rtol=0, atol=1e-3)
