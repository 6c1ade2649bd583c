"""Quantizing a model in place: names, checkpoints, sharing, errors, and the way back."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError, PlanError, QuantizationError
from fewbits.layers import (
    activation_quantizers,
    calibrate,
    dequantize,
    describe,
    quantizable,
    quantize,
    quantized_layers,
    report_layers,
    set_mode,
)
from fewbits.plan import LayerPlan, Plan, TensorPlan

W4A8 = LayerPlan(weight=TensorPlan(4, granularity="channel"), input=TensorPlan(8, symmetric=False))
W2 = LayerPlan(weight=TensorPlan(2))
ALL = Plan((("*", W4A8),))


class Net(nn.Module):
    """A small net with all that makes swapping hard: norms, dropout, a shared layer, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 1))
        self.again = self.block[2]
        self.shift = nn.Parameter(torch.zeros(6, 1, 1))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv1(x)).relu() + self.shift
        x = self.again(self.block(x).relu())
        return self.fc(x.mean((2, 3)))


class Language(nn.Module):
    """Embedding and head share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)).relu())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 6, 6)


@pytest.fixture
def net() -> Net:
    return Net().eval()


def snapshot(model: nn.Module) -> list[Any]:
    """Return all that quantize may change: classes, children, attributes, the identity of tensors and their values."""
    modules = [(n, type(m), sorted(vars(m)), [id(c) for c in m._modules.values()]) for n, m in model.named_modules()]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [*modules, *((n, id(t), t.detach().tolist()) for n, t in tensors)]


def test_parameters_keep_their_names_and_identity(net: Net) -> None:
    before = dict(net.named_parameters())
    assert quantize(net, ALL, verbose=False) is net
    after = dict(net.named_parameters())
    assert {n: id(p) for n, p in after.items() if n in before} == {n: id(p) for n, p in before.items()}
    assert all("_quantizer." in n for n in set(after) - set(before))
    assert isinstance(net.conv1, nn.Conv2d) and isinstance(net.fc, nn.Linear)


def test_dequantize_gives_the_very_model_back(net: Net, x: Tensor) -> None:
    want, before = net(x), snapshot(net)
    calibrate(quantize(net, ALL, verbose=False), [x])
    assert not torch.equal(net(x), want)
    assert dequantize(net) is net
    assert torch.equal(net(x), want) and snapshot(net) == before


def test_mode_float_is_the_float_model_and_modes_nest(net: Net, x: Tensor) -> None:
    want = net(x)
    calibrate(quantize(net, ALL, verbose=False), [x])
    quantized = net(x)
    with set_mode(net, "float"):
        assert torch.equal(net(x), want)
        with set_mode(net, "quantize"):
            assert torch.equal(net(x), quantized)
        assert torch.equal(net(x), want)
    assert torch.equal(net(x), quantized)
    with pytest.raises(ZeroDivisionError), set_mode(net, "float"):
        _ = 1 / 0
    assert torch.equal(net(x), quantized)
    with pytest.raises(QuantizationError, match=r"mode must be .*'observe'.*got 'int8'"), set_mode(net, "int8"):
        pass


def test_float_checkpoints_load_strictly_before_and_after(x: Tensor) -> None:
    source = Net().eval()
    with torch.no_grad():
        for p in source.parameters():
            p.copy_(torch.randn_like(p) * 3)
    floats = copy.deepcopy(source.state_dict())
    calibrate(quantize(source, ALL, verbose=False), [x])

    before = Net().eval()
    before.load_state_dict(floats, strict=True)
    calibrate(quantize(before, ALL, verbose=False), [x])

    after = Net().eval()
    calibrate(quantize(after, ALL, verbose=False), [x * 5])
    after.load_state_dict(floats, strict=True)
    with pytest.raises(QuantizationError, match="no range yet"):
        after(x)  # activation ranges belong to the weights that are gone
    calibrate(after, [x])
    assert torch.equal(before(x), source(x)) and torch.equal(after(x), source(x))
    assert torch.equal(after.fc.weight_quantizer.scale, source.fc.weight_quantizer.scale)


@pytest.mark.parametrize("lazily", [True, False])
@pytest.mark.parametrize("quantizer", ["ste", "lsq", "lsq+"])
def test_a_checkpoint_of_one_quantized_copy_loads_into_another(x: Tensor, quantizer: str, lazily: bool) -> None:
    act = TensorPlan(4, quantizer, symmetric=False)
    plan = Plan((("*", LayerPlan(weight=TensorPlan(3, quantizer, symmetric=False), input=act, output=act)),))
    first, second = Net(), Net()
    for model in (first, second):
        quantize(model, plan, verbose=False)
    if lazily:
        first.train()(x)
    else:
        calibrate(first, [x, x * 2])
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second.load_state_dict(state, strict=True)
    assert torch.equal(first.eval()(x), second.eval()(x))
    for a, b in zip(quantized_layers(first).values(), quantized_layers(second).values()):
        assert [q.calibrated for q in activation_quantizers(a)] == [q.calibrated for q in activation_quantizers(b)]
    state.pop("fc.weight_quantizer.scale")
    with pytest.raises(RuntimeError, match=r"fc\.weight_quantizer\.scale"):
        second.load_state_dict(state, strict=True)


def test_a_shared_module_is_quantized_once_and_stays_shared(net: Net) -> None:
    assert list(quantizable(net)) == ["conv1", "block.0", "block.2", "fc"]
    quantize(net, ALL, verbose=False)
    assert net.again is net.block[2] and "again" not in quantized_layers(net)
    assert [r.name for r in report_layers(net)].count("block.2") == 1


def test_tied_weights_stay_tied_and_share_their_quantizer() -> None:
    model, tokens = Language(), torch.randint(11, (3, 5))
    plan = Plan((("*", LayerPlan(weight=TensorPlan(3, granularity="channel"))),))
    quantize(model, plan, verbose=False)
    assert model.head.weight is model.embed.weight
    assert model.head.weight_quantizer is model.embed.weight_quantizer
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.head.weight is other.embed.weight and other.head.weight is not model.head.weight
        assert other.head.weight_quantizer is other.embed.weight_quantizer
        assert torch.equal(other(tokens), model(tokens))
    names = [n for n, _ in model.named_parameters()]
    assert sum("weight_quantizer.scale" in n for n in names) == 2  # shared parameters count once


def test_tied_weights_with_different_plans_are_refused() -> None:
    model = Language()
    before = snapshot(model)
    with pytest.raises(PlanError, match=r"'embed' and 'head' share one weight.*4 bit lsq channel and 2 bit lsq"):
        quantize(model, ALL.override(("embed", LayerPlan(weight=W4A8.weight)), ("head", W2)), verbose=False)
    with pytest.raises(PlanError, match=r"'embed' and 'head' share one weight.*float and 2 bit"):
        quantize(model, Plan((("head", W2),)), verbose=False)
    assert snapshot(model) == before


def test_one_of_two_tied_layers_quantized_anew_joins_the_quantizer_of_the_other() -> None:
    model = Language()
    layer_plan = LayerPlan(weight=TensorPlan(3))
    quantize(model, Plan((("*", layer_plan),)), verbose=False)
    for name in ("head", "embed"):
        quantize(model, Plan(((name, layer_plan),)), verbose=False)
        assert model.head.weight_quantizer is model.embed.weight_quantizer
    with pytest.raises(PlanError, match="share one weight"):
        quantize(model, Plan((("head", W2),)), verbose=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_apart_and_quantizable(net: Net, x: Tensor, copied: Callable[[Net], Net]) -> None:
    calibrate(quantize(net, ALL, verbose=False), [x])
    want = net(x)
    other = copied(net)
    assert torch.equal(other(x), want) and type(other.fc) is type(net.fc)
    assert other.fc.layer_plan == net.fc.layer_plan and other.again is other.block[2]
    quantize(other, Plan((("*", W2),)), verbose=False)
    dequantize(other)
    assert torch.equal(net(x), want)


def test_hooks_and_attributes_survive(net: Net, x: Tensor) -> None:
    calls: list[str] = []
    net.fc.register_forward_hook(lambda *_: calls.append("forward"))
    net.fc.register_forward_pre_hook(lambda *_: calls.append("before"))
    net.fc.weight.register_hook(lambda grad: calls.append("grad"))
    net.fc.note = "mine"
    calibrate(quantize(net, ALL, verbose=False), [x])
    calls.clear()
    net(x).sum().backward()
    assert calls == ["before", "forward", "grad"] and net.fc.note == "mine"
    dequantize(net)(x)
    assert calls[3:] == ["before", "forward"]


def test_a_pattern_that_matches_nothing_lists_near_names(net: Net) -> None:
    with pytest.raises(PlanError, match=r"'block\.3' matches no quantizable layer; did you mean 'block\.[02]'"):
        quantize(net, Plan((("*", W2), ("block.3", W2))), verbose=False)
    with pytest.raises(PlanError, match=r"'block' cannot be quantized: .*\(Sequential\); did you mean 'block"):
        quantize(net, Plan((("block", W2),)), verbose=False)
    assert not quantized_layers(net)


POISONED: dict[str, tuple[Plan, str]] = {
    "unknown quantizer of an input": (
        ALL.override(("fc", LayerPlan(input=TensorPlan(8, "lsk")))),
        "layer 'fc': unknown quantizer 'lsk'; did you mean 'lsq'",
    ),
    "unknown option of a weight": (
        ALL.override(("fc", LayerPlan(weight=TensorPlan(8, options={"narow": True})))),
        "weight of layer 'fc': .*narow",
    ),
    "operands": (ALL.override(("fc", LayerPlan(operands=TensorPlan(8)))), "layer 'fc': 'operands' is for attention"),
    "blocks of an activation": (
        ALL.override(("fc", LayerPlan(input=TensorPlan(8, granularity="block", block=2)))),
        "layer 'fc': quantizer 'lsq' is static",
    ),
    "no match": (ALL.override(("nothing", W2)), "matches no"),
}


@pytest.mark.parametrize("case", sorted(POISONED))
@pytest.mark.parametrize("quantized_before", [True, False])
def test_a_failed_quantize_leaves_the_model_as_it_was(net: Net, x: Tensor, case: str, quantized_before: bool) -> None:
    if quantized_before:
        calibrate(quantize(net, Plan((("conv1", W4A8), ("fc", W2))), verbose=False), [x])
    before, want = snapshot(net), net(x)
    plan, message = POISONED[case]
    with pytest.raises(FewbitsError, match=message):
        quantize(net, plan, verbose=False)
    assert snapshot(net) == before and torch.equal(net(x), want)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_layer(net: Net, poison: float) -> None:
    with torch.no_grad():
        net.block[0].weight[1, 2, 0, 0] = poison
    before = [type(m) for m in net.modules()]
    with pytest.raises(QuantizationError, match=r"layer 'block\.0': 1 of 324 values are NaN or Inf"):
        quantize(net, ALL, verbose=False)
    assert [type(m) for m in net.modules()] == before


def test_activations_that_are_not_finite_name_the_layer_that_gets_them(net: Net, x: Tensor) -> None:
    quantize(net, ALL, verbose=False)
    with torch.no_grad():
        net.bn.weight[2] = float("nan")
    with pytest.raises(QuantizationError, match=r"layer 'block\.0': .* values are NaN or Inf"):
        calibrate(net, [x])
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())
    assert all(layer.mode == "quantize" for layer in quantized_layers(net).values())


def test_an_error_of_calibrate_names_the_root_too() -> None:
    layer = quantize(nn.Linear(3, 2), Plan((("*", W4A8),)), verbose=False)
    with pytest.raises(QuantizationError, match=r"layer '': .*NaN"):
        calibrate(layer, [torch.full((2, 3), float("nan"))])
    calibrate(layer, [torch.randn(2, 3)])
    assert layer.input_quantizer.calibrated == 1


def test_quantizing_anew_replaces_what_the_plan_names_and_leaves_the_rest(net: Net, x: Tensor) -> None:
    calibrate(quantize(net, ALL, verbose=False), [x])
    kept = net.conv1.input_quantizer
    quantize(net, Plan((("fc", W2), ("block.0", None))), verbose=False)
    assert net.fc.layer_plan == W2 and net.fc.input_quantizer is None and net.fc.weight_quantizer.bits == 2
    assert net.conv1.layer_plan == W4A8 and net.conv1.input_quantizer is kept
    assert type(net.block[0]) is nn.Conv2d
    fresh = Net().eval()
    fresh.load_state_dict({k: v for k, v in net.state_dict().items() if "_quantizer" not in k})
    quantize(fresh, ALL.override(("fc", W2), ("block.0", None)), verbose=False)
    assert torch.equal(calibrate(fresh, [x])(x), calibrate(net, [x])(x))


def test_first_and_last_layers_can_stay_in_float(net: Net, x: Tensor) -> None:
    quantize(net, ALL.override(("conv1", None), ("fc", LayerPlan())), verbose=False)
    assert list(quantized_layers(net)) == ["block.0", "block.2"]
    assert type(net.conv1) is nn.Conv2d and type(net.fc) is nn.Linear
    rows = {row.name: row for row in report_layers(net)}
    assert rows["conv1"].reason == rows["fc"].reason == "left in float by the plan"


def test_the_table_tells_of_every_module_with_parameters_how_or_why_not(
    net: Net, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    quantize(net, ALL.override(("fc", None)))
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    for name, module in net.named_modules():
        if any(True for _ in module.parameters(recurse=False)) and "quantizer" not in name:
            assert (name or "(model)") in lines, name
    assert re.search(r"conv1 +Conv2d +weight 4 lsq channel, input 8 lsq affine", lines["conv1"])
    assert "left in float by the plan" in lines["fc"] and "BatchNorm2d" in lines["bn"]
    assert "no quantized twin for this type" in lines["(model)"]  # its bare parameter
    assert "quantizer" not in out
    quantize(net, ALL, verbose=False)
    assert capsys.readouterr().out == ""


def test_the_table_fits_into_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    quantize(nn.ModuleDict({"layer1_0_downsample_0": nn.Conv2d(3, 3, 1)}), ALL)
    row = capsys.readouterr().out.splitlines()[1]
    assert " ".join(row.split()) == "layer1_0_downsample_0 Conv2d weight 4 lsq channel, input 8 lsq affine"
    assert len(row) <= 80


def test_the_table_folds_a_long_name_but_never_cuts_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "a_block_whose_name_is_far_longer_than_any_column_of_a_table_of_eighty_columns_can_be"
    quantize(nn.ModuleDict({name: nn.Linear(3, 3)}), ALL)
    header, *rows = capsys.readouterr().out.splitlines()
    assert "".join(row[: header.index("type")].strip() for row in rows) == name


def test_describe() -> None:
    assert describe(None) == "float"
    assert describe(TensorPlan(4, "ste", False, "block", 32)) == "4 bit ste block 32 affine"


def test_calibrate_sees_what_the_float_model_feeds_its_layers(net: Net, x: Tensor) -> None:
    seen: list[Tensor] = []
    handle = net.fc.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(x)
    net(x + 1)
    handle.remove()
    act = TensorPlan(8, symmetric=False, range="minmax")
    quantize(net, Plan((("*", LayerPlan(weight=TensorPlan(1), input=act)),)), verbose=False)
    calibrate(net, [x, x + 1])
    q = net.fc.input_quantizer
    assert q.calibrated == 2
    both = torch.cat(seen)
    span = (both.max().clamp(min=0) - both.min().clamp(max=0)).item()
    assert q.scale.item() * 255 == pytest.approx(span, rel=0.02)


def test_calibrate_starts_anew_each_time_and_takes_any_kind_of_batch(x: Tensor) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.fc(a + b)

    model = quantize(Two(), ALL, verbose=False)
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    scales = []
    for batches in ([(a, b)], [[a, b]], [{"a": a, "b": b}], iter([(a * 9, b)]), (pair for pair in [(a, b)])):
        assert calibrate(model, batches) is model
        scales.append(model.fc.input_quantizer.scale.item())
        assert model.fc.input_quantizer.calibrated == 1
    assert scales[0] == scales[1] == scales[2] == scales[4] != scales[3]


def test_calibrate_only_some_layers_beside_others_as_they_are(net: Net, x: Tensor) -> None:
    plan = TensorPlan(4, symmetric=False)
    quantize(net, Plan((("*", LayerPlan(weight=TensorPlan(4), input=plan)),)), verbose=False)
    calibrate(net, [x])
    names = list(quantized_layers(net))
    before = {n: t.clone() for n, t in net.state_dict().items() if isinstance(t, Tensor)}
    calibrate(net, [3 * x], only=names[-1:])
    changed = {n for n, t in net.state_dict().items() if isinstance(t, Tensor) and not torch.equal(t, before[n])}
    assert changed and all(n.startswith(f"{names[-1]}.input_quantizer") for n in changed)
    with pytest.raises(QuantizationError, match=f"no quantized layer '{names[-1]}x' to calibrate; did you mean"):
        calibrate(net, [x], only=[f"{names[-1]}x"])


def test_calibrate_without_batches_is_an_error_and_keeps_the_ranges(net: Net, x: Tensor) -> None:
    calibrate(quantize(net, ALL, verbose=False), [x])
    want = net(x)
    with pytest.raises(QuantizationError, match="at least one batch"):
        calibrate(net, [])
    assert torch.equal(net(x), want)


def test_calibrate_leaves_training_flags_statistics_and_gradients_alone(x: Tensor) -> None:
    net = Net().train()
    net.bn.eval()  # frozen
    quantize(net, ALL, verbose=False)
    flags = {n: m.training for n, m in net.named_modules()}
    statistics = copy.deepcopy(net.bn.state_dict())
    calibrate(net, [x])
    assert {n: m.training for n, m in net.named_modules()} == flags
    assert all(torch.equal(statistics[k], v) for k, v in net.bn.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_calibrate_warns_of_layers_that_no_batch_reached(net: Net, x: Tensor) -> None:
    net.unused = nn.Linear(2, 2)
    quantize(net, ALL, verbose=False)
    with pytest.warns(UserWarning, match=r"input of 1 layers: \['unused'\]"):
        calibrate(net, [x])
    quantize(net, Plan((("unused", None),)), verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(net, [x])


def test_an_evaluating_model_without_ranges_is_an_error_not_a_silent_calibration(net: Net, x: Tensor) -> None:
    quantize(net, ALL, verbose=False)
    with pytest.raises(QuantizationError, match="no range yet"):
        net(x)
    net.train()(x)
    assert net.fc.input_quantizer.calibrated == 1
    net.eval()(x)


def test_the_model_itself_may_be_the_layer() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(5, 3)
    want = layer(x)
    assert quantize(layer, Plan((("", W4A8),)), verbose=False) is layer
    assert not torch.equal(calibrate(layer, [x])(x), want)
    assert torch.equal(dequantize(layer)(x), want)
