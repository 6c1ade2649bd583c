"""Fusion nodes at deployment: constants, both folds, no operator left, and the whole way from a U-Net to ONNX."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbits as fb
from fewbits import LayerPlan, Plan, TensorPlan
from fewbits.deploy import calibrate_fusion, code_mismatches, fix_fusion, fold_and_measure, fold_fusion
from fewbits.deploy.verify import open_session
from fewbits.errors import QuantizationError
from fewbits.layers import (
    FusionSettings,
    balance_fusion,
    freeze_fusion,
    fusion_nodes,
    quantized_layers,
    remove_fusion,
    set_mode,
    update_fusion,
)  # fmt: skip
from fewbits.quantizers import Requantize
from tests.layers.fusion_models import NODES, Concat, UNet, settled

FIXED = FusionSettings("fixed", gains=(1, 2.5))


def balanced(x: Tensor, settings: FusionSettings = FIXED, kernel: int = 3, **given: Any) -> nn.Module:
    """Return a quantized, calibrated U-Net with two nodes, in eval mode."""
    model = settled(lambda: UNet(kernel=kernel), x)
    balance_fusion(model, x, "auto", settings)
    for _ in range(10):
        model.train()(x)
    act = TensorPlan(**{"bits": 4, "quantizer": "lsq", **given})
    plan = Plan((("*", LayerPlan(TensorPlan(4, granularity="channel"), act)),))
    return fb.calibrate(fb.quantize(model.eval(), plan, verbose=False), [x])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("quantizer", ["lsq", "ste", "pact"])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.filterwarnings("ignore:.*unsigned 'pact'")
def test_requant_equals_the_constant_norm(bits: int, quantizer: str, symmetric: bool) -> None:
    x = torch.randn(8, 3, 16, 16)
    model = balanced(x, bits=bits, quantizer=quantizer, symmetric=symmetric)
    constants = calibrate_fusion(model, [x])
    assert list(constants) == NODES and all(sigma > 0 for _, sigma in constants.values())
    with torch.no_grad():
        want = model(x)
        assert fold_fusion(model, [x]) == {"join1.cat0": "requant into up1.0", "cat0": "requant into up0.0"}
        differ = (model(x) != want).any(1).float().mean()
    assert differ == 0 if bits < 8 else differ < 0.01  # a value at the very edge of two of many codes may fall over it
    assert not fusion_nodes(model) and type(model) is UNet
    assert isinstance(quantized_layers(model)["up0.0"].input_quantizer, Requantize)


def test_weight_equals_the_constant_norm_in_float_where_nothing_is_padded(tmp_path: Path) -> None:
    x = torch.randn(8, 3, 16, 16)
    model = balanced(x, kernel=1)
    calibrate_fusion(model, [x])
    with torch.no_grad():
        with set_mode(model, "float"):
            want = model(x)
        done = fold_fusion(model, [x], "weight")
        with set_mode(model, "float"):
            torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-5)
    assert done == {"join1.cat0": "weight into up1.0", "cat0": "weight into up0.0"}
    assert all(q.calibrated for q in [quantized_layers(model)["up0.0"].input_quantizer] if q is not None)
    packed = fb.pack(model)  # its batch norms stay, so the layers behind the nodes have biases of their own
    assert torch.equal(packed(x), model(x))
    fb.save(packed, tmp_path / "m.safetensors")
    assert torch.equal(fb.load(tmp_path / "m.safetensors", UNet(kernel=1))(x), packed(x))


def test_weight_keeps_a_node_where_zeros_are_padded_and_the_model_as_it_was() -> None:
    x = torch.randn(8, 3, 16, 16)
    model = balanced(x)
    calibrate_fusion(model, [x])
    want = model(x)
    done = fold_fusion(model, [x], "weight")
    assert all("kept: zeros at the border" in how for how in done.values())
    assert torch.equal(model(x), want) and list(fusion_nodes(model)) == NODES


def test_constants_are_the_means_over_what_the_deployed_nodes_get() -> None:
    x = torch.randn(8, 3, 16, 16)
    model = balanced(x)
    node = fusion_nodes(model)["cat0"]
    seen: list[Tensor] = []
    node.register_forward_pre_hook(lambda m, args: seen.append(node.fuse(args[0])))
    constants = calibrate_fusion(model, [x[:4], x[4:]])
    model(x)
    mean, std = node.statistics(seen[-1].detach())
    step = float(quantized_layers(model)["up0.0"].input_quantizer.step().detach())  # type: ignore[union-attr, arg-type]
    mu, sigma = constants["cat0"]
    assert sigma == pytest.approx(float(std.mean()), rel=1e-4)
    assert abs(mu - float(mean.mean())) <= sigma * step / 2 * 1.001
    assert mu / (sigma * step) == pytest.approx(round(mu / (sigma * step)), abs=1e-3)


class Odd(nn.Module):
    """Results of nodes that go where no fold can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.a(x), self.b(x)
        used_twice = torch.cat([a, b], 1)
        return self.c(used_twice) + used_twice[:, :4], self.c(torch.cat([b, a], 1).relu()) + (a + b).sum()


def test_nodes_that_cannot_be_folded_stay_as_one_multiply_add_and_say_why(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 5, 5)
    model = Odd().eval()
    balance_fusion(model, x, ["cat0", "cat1"], FIXED)
    fb.calibrate(fb.quantize(model, Plan((("*", LayerPlan(TensorPlan(4), TensorPlan(4))),)), verbose=False), [x])
    done = fold_fusion(model, [x])
    assert done == {"cat0": "kept: its result goes to __getitem__", "cat1": "kept: its result goes to relu"}
    assert all(node.constant for node in fusion_nodes(model).values())
    packed = fb.pack(model)
    fb.export_onnx(packed, tmp_path / "m.onnx", x)
    got = torch.from_numpy(open_session(tmp_path / "m.onnx")((x,)))
    torch.testing.assert_close(got, packed(x)[0], atol=1e-4, rtol=1e-4)


def test_a_node_that_runs_twice_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.join, self.a, self.b = Concat(), nn.Conv2d(6, 3, 1), nn.Conv2d(6, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.join([self.a(self.join([x, x.flip(2)])), x]))
            return y

    model, x = Twice().eval(), torch.randn(2, 3, 6, 6)
    balance_fusion(model, x, ["join"], FIXED)
    fb.calibrate(fb.quantize(model, Plan((("*", LayerPlan(TensorPlan(4), TensorPlan(4))),)), verbose=False), [x])
    assert fold_fusion(model, [x]) == {"join.cat0": "kept: its result goes to more than one run of it"}


def test_adds_fold_with_equal_gains_only() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.c(self.a(x) + self.b(x))
            return y

    x = torch.randn(4, 3, 5, 5)
    for settings, how in ((FusionSettings(), "requant into c"), (FIXED, "kept: an add with unequal gains")):
        model = Sum().eval()
        balance_fusion(model, x, ["add0"], settings)
        fb.calibrate(fb.quantize(model, Plan((("*", LayerPlan(TensorPlan(4), TensorPlan(4))),)), verbose=False), [x])
        calibrate_fusion(model, [x])
        want = model(x)
        assert fold_fusion(model, [x]) == {"add0": how}
        assert torch.equal(model(x), want)


@pytest.mark.parametrize("factor", [1.0, 1.4])
def test_layers_with_steps_of_their_own_round_the_mean_to_them(factor: float) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(n, 4, 1) for n in (3, 3, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([self.a(x).relu(), self.b(x).relu()], 1)
            out: Tensor = self.c(y) + self.d(y)
            return out

    model, x = Two().eval(), torch.randn(4, 3, 5, 5)
    node = balance_fusion(model, x, ["cat0"], FIXED)["cat0"]
    fb.calibrate(fb.quantize(model, Plan((("*", LayerPlan(TensorPlan(4), TensorPlan(4))),)), verbose=False), [x])
    model.d.input_quantizer.scale.detach().mul_(factor)  # type: ignore[union-attr, operator]
    given = [torch.rand(2, 4, 5, 5), torch.rand(2, 4, 5, 5)]
    h, (mu, sigma) = node.fuse(given), calibrate_fusion(model, [x])["cat0"]
    before = {name: copy.deepcopy(quantized_layers(model)[name].input_quantizer) for name in "cd"}
    fold_fusion(model, [x])
    for name, old in before.items():
        new = quantized_layers(model)[name].input_quantizer
        assert old is not None and isinstance(new, Requantize)
        step = float(old.step().detach())  # type: ignore[union-attr]
        own = float(new.shift) * sigma * step
        assert abs(own - mu) <= (sigma * step / 2 if name == "d" and factor != 1 else 1e-5)
        torch.testing.assert_close(new(torch.cat(given, 1)), old((h - own) / sigma))


def test_fixed_norms_are_folded_exactly_into_several_layers() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Conv2d(3, 4, 3, padding=1) for _ in range(2))
            self.c, self.d = (nn.Conv2d(8, 2, 3, padding=1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.cat([self.a(x).relu(), self.b(x[:, :, ::2, ::2]).relu().repeat(1, 1, 2, 2)], 1)
            out: Tensor = self.c(h) - self.d(h)
            return out

    x = torch.randn(4, 3, 8, 8)
    model = Pair()
    balance_fusion(model, x, "auto", FIXED)
    plan = Plan((("*", LayerPlan(TensorPlan(4, granularity="channel"), TensorPlan(3, "lsq"))),))
    fb.calibrate(fb.quantize(model.eval(), plan, verbose=False), [x])
    layers = quantized_layers(model)
    with torch.no_grad():
        layers["d"].input_quantizer.scale.mul_(1.3)  # type: ignore[union-attr, operator]
        fix_fusion(model, [x])
        want = model(x)
        assert fold_fusion(model, [x]) == {"cat0": "requant into c, requant into d"}
        assert torch.equal(model(x), want)
    with pytest.raises(QuantizationError, match="fix_fusion needs at least one batch"):
        fix_fusion(model, [])


def test_learned_thresholds_take_a_fusion_in_and_leave_no_operator(tmp_path: Path) -> None:
    x = torch.randn(8, 3, 16, 16)
    model = balanced(x, quantizer="n2uq", bits=2)
    calibrate_fusion(model, [x])
    plain = remove_fusion(copy.deepcopy(model))
    with torch.no_grad():
        want = model(x)
        assert set(fold_fusion(model, [x]).values()) == {"requant into up1.0", "requant into up0.0"}
        assert torch.equal(model(x), want)
    quantizer = quantized_layers(model)["up0.0"].input_quantizer
    given = torch.randn(2, 20, 8, 8, requires_grad=True)
    assert quantizer is not None and torch.equal(quantizer.encode(given).decode(), quantizer(given))
    quantizer(given).sum().backward()
    assert float((given.grad != 0).float().mean()) > 0.2  # type: ignore[union-attr]
    packed = fb.pack(model, x)
    for name, one in (("m", packed), ("plain", fb.pack(plain, x))):
        fb.export_onnx(one, tmp_path / f"{name}.onnx", x)
    assert operators(tmp_path / "m.onnx") == operators(tmp_path / "plain.onnx")
    got = torch.from_numpy(open_session(tmp_path / "m.onnx")((x,)))
    assert float((got - packed(x)).abs().median()) < 1e-4
    fb.save(packed, tmp_path / "m.safetensors")
    assert torch.equal(fb.load(tmp_path / "m.safetensors", UNet())(x), packed(x))


def test_a_single_threshold_keeps_its_node_and_the_model_as_it_was() -> None:
    x = torch.randn(4, 3, 16, 16)
    model = balanced(x, quantizer="n2uq", bits=1, symmetric=False)
    calibrate_fusion(model, [x])
    want = model(x)
    assert set(fold_fusion(model, [x]).values()) == {"kept: the input quantizer 'n2uq' cannot take it in"}
    assert torch.equal(model(x), want)


def test_plain_nodes_leave_and_dynamic_quantizers_keep_theirs() -> None:
    x = torch.randn(4, 3, 16, 16)
    model = balanced(x, FusionSettings("off", norm=False))
    want = model(x)
    assert set(fold_fusion(model, [x]).values()) == {"plain"} and torch.equal(model(x), want)
    model = balanced(x, quantizer="denoise")
    assert set(fold_fusion(model, [x]).values()) == {"kept: the input quantizer 'denoise' cannot take it in"}


def test_bad_input() -> None:
    x = torch.randn(2, 3, 16, 16)
    model = balanced(x)
    with pytest.raises(QuantizationError, match=r"must be one of \('requant', 'weight'\), got 'none'"):
        fold_fusion(model, [x], "none")
    with pytest.raises(QuantizationError, match="at least one batch"):
        fold_fusion(model, [])


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_from_a_unet_to_onnx(tmp_path: Path) -> None:
    """Balance, quantize, train, freeze, fold, pack, export: no operator is left, and the answers are equal."""
    x = torch.randn(8, 3, 16, 16)
    target = F.avg_pool2d(x.mean(1), 3, 1, 1).mul(4).round().long().clamp(-2, 2) + 2
    model = balanced(x, FusionSettings())
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)

    def train(steps: int, rate: float) -> None:
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = rate
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            update_fusion(model)
            optimizer.step()
        model.eval()

    train(20, 2e-3)
    freeze_fusion(model)
    gains = {name: node.gains for name, node in fusion_nodes(model).items()}
    train(5, 2e-3)
    assert all(torch.equal(node.gains, gains[name]) for name, node in fusion_nodes(model).items())
    assert all(float((g[0] - g[1]).abs()) > 1e-3 for g in gains.values())

    plain = remove_fusion(copy.deepcopy(model))
    evaluate = lambda m: {"accuracy": float((m(x).argmax(1) == target).float().mean())}  # noqa: E731
    report = fold_and_measure(model, [x], evaluate, finetune=lambda m: train(5, 2e-5))
    assert set(report.nodes) == set(NODES) and all("requant" in how for how in report.nodes.values())
    assert report.folded == report.constant_norm
    assert report.finetuned is not None and report.finetuned["accuracy"] >= report.folded["accuracy"] - 0.02
    assert report.true_norm["accuracy"] > 0.3

    packed = fb.pack(model, x)
    assert code_mismatches(model, packed) == 0
    fb.save(packed, tmp_path / "m.safetensors")
    again = fb.load(tmp_path / "m.safetensors", UNet())
    assert torch.equal(again(x), packed(x))

    fb.export_onnx(packed, tmp_path / "m.onnx", x[:2])
    fb.export_onnx(fb.pack(plain, x), tmp_path / "plain.onnx", x[:2])
    assert operators(tmp_path / "m.onnx") == operators(tmp_path / "plain.onnx")
    seen = fb.verify(tmp_path / "m.onnx", packed, [x], min_agreement=0)
    assert seen.median_abs_diff < 1e-4
    got, want = open_session(tmp_path / "m.onnx")((x,)), packed(x).numpy()
    assert (got.argmax(1) == want.argmax(1)).mean() > 0.999
