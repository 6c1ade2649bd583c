"""Fusion nodes in models: where they are found, how they come in, and how they go."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbits as fb
from fewbits import LayerPlan, Plan, TensorPlan
from fewbits.errors import PlanError, QuantizationError
from fewbits.layers import (
    BalancedFusion,
    FusionSettings,
    balance_fusion,
    find_sites,
    fusion_nodes,
    remove_fusion,
    settle_fusion,
    update_fusion,
)  # fmt: skip
from fewbits.layers.settle import measure_statistics
from tests.layers.fusion_models import NODES, Pan, UNet, settled

PLAIN = FusionSettings("off", norm=False)


def test_auto_finds_what_fuses_scales_and_nothing_else() -> None:
    assert [s.name for s in find_sites(UNet(), torch.randn(1, 3, 8, 8)) if s.fuses] == NODES
    sites = {s.name: s for s in find_sites(Pan(), torch.randn(1, 3, 32, 32))}
    assert {n for n, s in sites.items() if s.fuses} == {"cat0", "cat1", "add0"}
    assert {"residual.add0", "csp.cat0", "spp.cat0", "add1"} <= set(sites)
    assert sites["cat0"].branches == ("deep", "shallow") and sites["add0"].branches == ("shallow", "deep")


class Gated(nn.Module):
    """out = up + sigmoid(conv(up + skip)) skip, between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.gate, self.out = nn.Conv2d(3, 3, 3, 2, 1), Gate(), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        up = torch.nn.functional.interpolate(self.down(x), scale_factor=2)
        y: Tensor = self.out(self.gate(up, x))
        return y.sigmoid()


class Gate(nn.Module):
    branches = ("up", "skip")

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)

    def forward(self, up: Tensor, skip: Tensor) -> Tensor:
        return up + self.conv(up + skip).sigmoid() * skip


def test_a_gated_add_is_balanced_by_the_gradients_before_its_gate() -> None:
    model, x = Gated().train(), torch.randn(4, 3, 8, 8, requires_grad=True)
    assert [s.name for s in find_sites(model, x) if s.fuses] == ["gate.add1"]  # not the sum inside the gate
    ratios = {}
    for measure in ("branches", "inputs"):
        balanced = copy.deepcopy(model)
        (node,) = balance_fusion(balanced, x, "auto", FusionSettings(measure=measure)).values()
        assert node.branches == ("up", "skip")
        balanced(x).square().sum().backward()
        update_fusion(balanced)
        ratios[measure] = node.log_ratio()
    assert ratios["branches"] == 0 and abs(ratios["inputs"]) > 0.1
    model = UNet()
    balance_fusion(model, x, ["cat0"], FusionSettings(measure="inputs"))
    with pytest.raises(QuantizationError, match="needs a forward of 2 tensors, one a branch"):
        model(x)


def test_a_quantized_model_has_the_same_sites() -> None:
    model, x = UNet(), torch.randn(1, 3, 8, 8)
    fb.quantize(model, Plan((("*", LayerPlan(TensorPlan(4), TensorPlan(4))),)), verbose=False)
    assert [s.name for s in find_sites(model, x) if s.fuses] == NODES


def test_torchvision_pyramids_are_found_in_the_forward_of_a_library() -> None:
    from torchvision.ops import FeaturePyramidNetwork

    features = {"a": torch.randn(1, 4, 16, 16), "b": torch.randn(1, 6, 8, 8), "c": torch.randn(1, 8, 4, 4)}
    model = FeaturePyramidNetwork([4, 6, 8], 5)
    nodes = balance_fusion(model, (features,))
    assert list(nodes) == ["add0", "add1"] and all(n.op == "add" for n in nodes.values())
    assert {k: v.shape[1] for k, v in model(features).items()} == {"a": 5, "b": 5, "c": 5}


@pytest.mark.parametrize("model", [UNet(), Pan()])
def test_plain_nodes_change_nothing_in_any_mode(model: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    names = [s.name for s in find_sites(model, x)]
    for training in (True, False):
        plain = copy.deepcopy(model).train(training)
        balanced = copy.deepcopy(model).train(training)
        nodes = balance_fusion(balanced, x, names, PLAIN)  # all of them, the residual's += too
        assert list(nodes) == names
        want, got = plain(x), balanced(x)
        assert all(torch.equal(a, b) for a, b in zip(_flat(want), _flat(got)))
        sum(t.square().mean() for t in _flat(got)).backward()  # type: ignore[union-attr]
        sum(t.square().mean() for t in _flat(want)).backward()  # type: ignore[union-attr]
        grads = dict(balanced.named_parameters())
        assert all(torch.equal(p.grad, grads[n].grad) for n, p in plain.named_parameters() if p.grad is not None)


def _flat(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def test_names_stay_and_checkpoints_go_both_ways() -> None:
    model, x = UNet(), torch.randn(2, 3, 8, 8)
    plain = copy.deepcopy(model)
    balance_fusion(model, x)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert isinstance(model, UNet) and list(fusion_nodes(model)) == NODES
    model.load_state_dict(plain.state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False).eval()
    assert torch.equal(again(x), copy.deepcopy(model).eval()(x))
    assert not torch.equal(again(x), plain.eval()(x))
    assert type(remove_fusion(model)) is UNet and type(model.join1).__name__ == "Concat"
    assert torch.equal(model.eval()(x), plain(x))
    plain.load_state_dict(model.state_dict())


def test_a_name_may_be_the_module_of_a_single_node() -> None:
    model, x = UNet(), torch.randn(2, 3, 8, 8)
    assert list(balance_fusion(model, x, ["join1"])) == ["join1.cat0"]
    assert type(model) is UNet
    remove_fusion(model, ["join1.cat0"])
    assert not fusion_nodes(model)


def test_every_node_is_reached_and_measured_in_training() -> None:
    model, x = UNet().train(), torch.randn(2, 3, 8, 8)
    nodes = balance_fusion(model, x)
    for _ in range(2):
        model(x).square().mean().backward()
    update_fusion(model)
    assert all(bool(torch.isfinite(n.energy).all()) for n in nodes.values())
    assert all(n.lam.abs().sum() > 0 for n in nodes.values())


def test_a_module_that_throws_leaves_no_hook_behind() -> None:
    from torch.nn.modules import module

    model, x = UNet(), torch.randn(2, 3, 8, 8)
    balance_fusion(model, x)
    before = len(module._global_forward_hooks), len(module._global_forward_pre_hooks)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 4, 8, 8))
    assert (len(module._global_forward_hooks), len(module._global_forward_pre_hooks)) == before
    assert model(x).shape == (2, 5, 8, 8)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (["join1.cat1"], r"no fusion node 'join1.cat1'.*did you mean 'join1.cat0'"),
        (["decoder"], r"no fusion node 'decoder'.*the nodes of this model are \['join1.cat0', 'cat0'\]"),
        ([], "no fusion nodes are named"),
    ],
)
def test_names_that_are_not_there(nodes: list[str], message: str) -> None:
    model = UNet()
    with pytest.raises(PlanError, match=message):
        balance_fusion(model, torch.randn(1, 3, 8, 8), nodes)
    assert type(model) is UNet and not fusion_nodes(model)


def test_other_refusals() -> None:
    x = torch.randn(1, 3, 16, 16)
    with pytest.raises(PlanError, match=r"module '' has \d fusions: name one of \['cat0'"):
        balance_fusion(Pan(), x, [""])
    with pytest.raises(PlanError, match="no node of this model fuses different scales"):
        balance_fusion(nn.Sequential(nn.Conv2d(3, 4, 1)), x)
    model = UNet()
    balance_fusion(model, x)
    with pytest.raises(PlanError, match="balanced already"):
        balance_fusion(model, x)

    class Single(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x], 1)

    with pytest.raises(PlanError, match=r"no fusion node 'cat0': .*two or more tensors"):
        balance_fusion(Single(), x, ["cat0"])

    class Broadcast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.mean((2, 3), keepdim=True)

    with pytest.raises(PlanError, match=r"no fusion node 'add0': .*of equal size"):
        balance_fusion(Broadcast(), x, ["add0"])


def test_branches_whose_sizes_part_later_are_named() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([x, y], 1)

    model, x = Two(), torch.randn(1, 3, 4, 4)
    balance_fusion(model, (x, x + 1), ["cat0"])
    with pytest.raises(QuantizationError, match=r"fusion node 'cat0': branches of shapes .* must agree in all axes"):
        model(x, torch.randn(1, 3, 5, 5))


@pytest.mark.parametrize("norm", [True, False])
def test_settling_brings_the_trained_function_back(norm: bool) -> None:
    x = torch.randn(16, 3, 16, 16)
    model = settled(lambda: UNet(norm, kernel=1), x)
    with torch.no_grad():
        want = model(x)
        balance_fusion(model, x, ["cat0"], FusionSettings("fixed", gains=(1, 2)))
        inserted = (model(x) - want).norm() / want.norm()
        done = settle_fusion(model, [x])
        after = (model(x) - want).norm() / want.norm()
    assert ("batch norms" in done["cat0"]) is norm and ("up0.0" in done["cat0"]) is not norm
    assert after < (0.85 if norm else 0.3) * inserted  # what varies from place to place stays


def test_settling_by_weights_is_exact_where_statistics_are_constant() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = settled(lambda: UNet(False, kernel=1), x)
    with torch.no_grad():
        want = model(x)
        node = balance_fusion(model, x, ["cat0"], FusionSettings("fixed", gains=(1, 3)))["cat0"]
        mean, std = measure_statistics(model, node, [x])
        settle_fusion(model, [x])
        node.mu.fill_(mean)
        node.sigma.fill_(std)
        node.constant = True
        torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-4)


def test_weights_are_settled_for_what_new_batch_norms_deliver() -> None:
    x = torch.randn(8, 3, 16, 16)
    model = settled(lambda: UNet(kernel=1), x)
    model.up0[1] = nn.Identity()  # type: ignore[operator, union-attr]
    before = model.up0[0].weight.detach().clone()  # type: ignore[index, union-attr]
    nodes = balance_fusion(model, x, "auto", FusionSettings("off"))
    done = settle_fusion(model, [x])
    assert done == {"join1.cat0": "batch norms estimated anew", "cat0": "weights rescaled: up0.0"}
    _, std = measure_statistics(model, nodes["cat0"], [x])
    torch.testing.assert_close(model.up0[0].weight.detach(), std * before)  # type: ignore[index, union-attr]


def test_settling_is_for_float_models() -> None:
    model, x = UNet(), torch.randn(1, 3, 8, 8)
    balance_fusion(model, x)
    with pytest.raises(QuantizationError, match="at least one batch"):
        settle_fusion(model, [])
    fb.quantize(model, Plan((("*", LayerPlan(TensorPlan(4))),)), verbose=False)
    with pytest.raises(QuantizationError, match="before quantize"):
        settle_fusion(model, [x])


def test_a_node_of_the_models_own_can_be_retired() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.join = BalancedFusion(2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.join([x, x.flip(1)])
            return y

    model, x = Own(), torch.randn(1, 3, 4, 4)
    assert list(fusion_nodes(model)) == ["join"]
    assert torch.equal(remove_fusion(model)(x), torch.cat([x, x.flip(1)], 1))


def test_nodes_live_on_the_device_of_the_model_and_follow_it() -> None:
    model = UNet().to("meta")
    nodes = balance_fusion(model, torch.randn(1, 3, 8, 8, device="meta"))
    assert list(nodes) == NODES and {n.lam.device.type for n in nodes.values()} == {"meta"}
