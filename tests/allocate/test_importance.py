from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.allocate.importance import Merge, group_importance
from fewbits.errors import DataError, PlanError, QuantizationError

I0, I1 = torch.tensor([4.0, 2.0, 2.0]), torch.tensor([0.1, 0.3, 0.6])


def merged(reducer: str, maps: list[Tensor], alpha: float = 0.1) -> Tensor:
    merge = Merge(reducer, len(maps), alpha)
    for found in maps:
        merge.add({"layer": found.clone()}, float(found.sum()))
    return merge.result({str(i): float(found.sum()) for i, found in enumerate(maps)})["layer"]


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4, 2))


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(5, 1, 4, 4), torch.randint(2, (5,))) for _ in range(count)]


def test_golden_of_the_balanced_reducer() -> None:
    torch.testing.assert_close(merged("balanced", [I0, I1]), torch.tensor([4.5, 2.7, 5.4]))
    assert torch.equal(merged("max", [I0, I1]), I0)
    torch.testing.assert_close(merged("mean", [I0, I1]), (I0 + I1) / 2)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.7, 0.99])
def test_cvar_is_the_mean_of_the_largest(alpha: float) -> None:
    maps = [torch.rand(7) for _ in range(6)]
    kept = max(1, math.ceil((1 - alpha) * 6 - 1e-9))
    want = torch.stack(maps).sort(0, descending=True).values[:kept].mean(0)
    torch.testing.assert_close(merged("cvar", maps, alpha), want)


@pytest.mark.parametrize("reducer", ["max", "mean", "balanced"])
def test_the_order_of_groups_does_not_matter_and_balanced_ignores_their_scale(reducer: str) -> None:
    maps = [torch.rand(9) for _ in range(3)]
    torch.testing.assert_close(merged(reducer, maps), merged(reducer, maps[::-1]))
    scaled = merged(reducer, [maps[0] * 50, *maps[1:]])
    same = bool((scaled.argsort() == merged(reducer, maps).argsort()).all())
    assert same == (reducer == "balanced")


@pytest.mark.parametrize("metric", ["gradient", "grape", "fisher"])
def test_each_metric_is_the_mean_over_the_batches_of_a_group(metric: str) -> None:
    net, groups = model().eval(), {"a": batches(2), "b": batches(1)}
    found = group_importance(net, groups, loss, metric=metric, reducer="mean")
    want = []
    for parts in groups.values():
        if metric == "fisher":
            parts = [(x[i : i + 1], y[i : i + 1]) for x, y in parts for i in range(len(x))]
        gradients = [torch.autograd.grad(loss(net, part), [net[0].weight])[0] for part in parts]
        weight = net[0].weight.detach()
        each = [g.abs() if metric == "gradient" else (g * weight).square() for g in gradients]
        want.append(torch.stack(each).mean(0))
    torch.testing.assert_close(found.merged["0"], (want[0] + want[1]) / 2)
    torch.testing.assert_close(found.groups["a"]["0"], want[0].double().flatten(1).sum(1))


def test_the_model_is_bit_identical_afterwards() -> None:
    net = model()
    net[4].weight.grad = torch.ones_like(net[4].weight)
    net[1].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    group_importance(net, {"a": batches()}, loss)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training and bool((net[4].weight.grad == 1).all()) and net[0].weight.grad is None
    assert not net[1].bias.requires_grad and net[1].weight.requires_grad


def test_units_are_pooled_by_output_channel_or_by_layer() -> None:
    net = model()
    found = group_importance(net, {"a": batches(), "b": batches()}, loss)
    rows = found.merged["0"].double().flatten(1)
    torch.testing.assert_close(found.units(net)["0"], rows.sum(1))
    torch.testing.assert_close(found.units(net, "layer", "mean")["0"], rows.mean().reshape(1))
    with pytest.raises(PlanError, match="unit must be"):
        found.units(net, "weight")


def test_what_cannot_be_measured_is_told() -> None:
    net = model()
    with pytest.raises(DataError, match="group 'b' has no batch"):
        group_importance(net, {"a": batches(), "b": []}, loss)
    with pytest.raises(DataError, match="needs groups, got none"):
        group_importance(net, {}, loss)
    with pytest.raises(PlanError, match="metric must be one of"):
        group_importance(net, {"a": batches()}, loss, metric="hawq")
    with pytest.raises(DataError, match=r"loss of batch 1 .*of group 'a'"):
        group_importance(net, {"a": batches()}, lambda n, b: loss(n, b) * float("nan"))
    with pytest.raises(QuantizationError, match=r"layer '0' for group 'a' is not finite"):
        group_importance(net, {"a": batches()}, lambda n, b: loss(n, b) * 1e30)
    with pytest.raises(PlanError, match="0 <= alpha < 1"):
        group_importance(net, {"a": batches()}, loss, reducer="cvar", alpha=1.0)
