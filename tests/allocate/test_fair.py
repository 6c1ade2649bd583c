from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewbits as fb
from fewbits.allocate.fair import quantile_bits, weighted_bits
from fewbits.allocate.importance import Importance
from fewbits.errors import BudgetError, PlanError
from fewbits.plan import Plan

SCORES = [0.1, 0.5, 0.2, 0.9, 0.4, 0.3, 0.8, 0.6, 0.7, 1.0]


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


def importance(net: nn.Module, groups: int = 2) -> Importance:
    maps = [{n: torch.rand_like(net[int(n)].weight) ** 8 for n in ("0", "2", "4")} for _ in range(groups)]  # type: ignore
    merged = {n: torch.stack([m[n] for m in maps]).amax(0) for n in maps[0]}
    return Importance(
        merged, {str(i): {n: v.double().sum(1) for n, v in m.items()} for i, m in enumerate(maps)}, "grape", "max"
    )


def allocate(net: nn.Module, bits: float, **options: Any) -> Plan:
    given: dict[str, Any] = {"menu": (2, 3, 4, 5, 6, 7, 8), "first_last": None, "quantizer": "maxabs"}
    if "importance" not in options:
        given["importance"] = importance(net)
    return fb.allocate(net, fb.Budget(average_bits=bits), method="fair", **{**given, **options})


def widths(plan: Plan, net: nn.Module) -> list[int]:
    """Return the bits of each output channel, in order."""
    found: list[int] = []
    for name, layer in plan:
        assert layer is not None and layer.weight is not None
        rows = len(net.get_submodule(name).weight)  # type: ignore[arg-type]
        found += layer.weight.channel_bits or (layer.weight.bits,) * rows
    return found


def sizes() -> list[int]:
    return [6] * 8 + [8] * 5 + [5] * 3


def test_golden_of_the_quantile_rule() -> None:
    bits = quantile_bits(SCORES, (2, 4, 8), (0.2, 0.4, 0.4))
    assert bits == [2, 4, 2, 8, 4, 4, 8, 4, 8, 8] and np.mean(bits) == pytest.approx(5.2)


def test_the_weighted_rule_has_its_shares_of_the_weights() -> None:
    assert weighted_bits([0.1, 0.2, 0.3, 0.4], [80, 10, 5, 5], (2, 8), (0.5, 0.5)) == [2, 8, 8, 8]
    scores, counts = torch.rand(500).numpy(), torch.randint(1, 100, (500,)).numpy()
    bits = np.array(weighted_bits(scores, counts, (2, 4, 8), (0.2, 0.4, 0.4)))
    got = [counts[bits == b].sum() / counts.sum() for b in (2, 4, 8)]
    assert got == pytest.approx([0.2, 0.4, 0.4], abs=0.01)
    assert bool((np.diff(bits[scores.argsort()]) >= 0).all()), "higher scores never get fewer bits"


def test_the_solver_spends_the_budget_and_no_cheapest_raise_fits() -> None:
    net = model()
    for budget in (2.5, 3.0, 4.4, 7.9):
        bits = widths(allocate(net, budget), net)
        spent, total = sum(n * b for n, b in zip(sizes(), bits)), budget * sum(sizes())
        assert spent <= total + 1e-9
        assert all(spent + n > total for n, b in zip(sizes(), bits) if b < 8)


def test_the_solver_is_the_best_of_all_choices() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    given = importance_of(net)
    plan = allocate(net, 4.0, menu=(2, 4, 8), importance=given)
    scores = torch.cat([v.double().sum(1) for v in given.merged.values()]).tolist()
    counts = [3] * 4 + [4] * 2

    def distortion(bits: Any) -> float:
        return sum(s * 4.0**-b for s, b in zip(scores, bits))

    fitting = (b for b in itertools.product((2, 4, 8), repeat=6) if sum(n * x for n, x in zip(counts, b)) <= 4 * 20)
    assert distortion(widths(plan, net)) == pytest.approx(min(map(distortion, fitting)), rel=1e-5)


def importance_of(net: nn.Sequential) -> Importance:
    maps = {str(i): torch.rand_like(layer.weight) ** 4 for i, layer in enumerate(net)}  # type: ignore[arg-type]
    return Importance(maps, {"a": {n: v.double().sum(1) for n, v in maps.items()}}, "grape", "max")


def test_minimax_serves_the_worst_group_better() -> None:
    net = model()
    found = importance(net, groups=3)

    def worst(plan: Plan) -> float:
        bits, losses = torch.tensor(widths(plan, net)), []
        for layers in found.groups.values():
            own = torch.cat(list(layers.values()))
            losses.append(float((own / own.sum() * 4.0**-bits).sum()))
        return max(losses)

    plain = {n: torch.zeros_like(v) for n, v in found.merged.items()}
    for name, value in plain.items():
        value[:, 0] = sum(layers[name] for layers in found.groups.values())  # as if all were one group
    as_one = Importance(plain, found.groups, "grape", "mean")
    fair, blind = (allocate(net, 3.0, rule=r, importance=i) for r, i in (("minimax", found), ("solver", as_one)))
    assert worst(fair) < worst(blind)


def test_guards_hold_the_ends_and_layers_may_be_units() -> None:
    net = model()
    plan = allocate(net, 6.5, first_last=8)
    bits = widths(plan, net)
    assert bits[:8] == [8] * 8 and bits[13:] == [8] * 3
    assert sum(n * b for n, b in zip(sizes(), bits)) <= 6.5 * sum(sizes())
    plan = allocate(net, 4.0, unit="layer", quantizer="lsq")
    assert all(
        layer is not None and layer.weight is not None and layer.weight.channel_bits is None for _, layer in plan
    )
    assert plan.decided_from["predicted"]["average_bits"] <= 4


def test_the_plan_runs_and_tells_both_means() -> None:
    net = model()
    plan = allocate(net, 4.0)
    bits = widths(plan, net)
    told = plan.decided_from
    assert told["channel_average_bits"] == pytest.approx(np.mean(bits))
    assert told["predicted"]["average_bits"] == pytest.approx(sum(n * b for n, b in zip(sizes(), bits)) / sum(sizes()))
    assert Plan.from_dict(plan.to_dict()) == plan
    fb.quantize(net, plan, verbose=False)
    assert net(torch.randn(2, 6)).shape == (2, 3)


def test_importance_is_measured_where_it_is_not_given() -> None:
    net = model()

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (module(batch[0]) - batch[1]).square().mean()

    groups = {g: [(torch.randn(4, 6), torch.randn(4, 3))] for g in ("light", "dark")}
    plan = allocate(net, 3.0, importance=None, groups=groups, loss=loss)
    assert plan.decided_from["metric"] == "grape" and plan.decided_from["reducer"] == "balanced"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"quantizer": "lsq"}, PlanError, r"one width for all channels: take one of \[.*'maxabs'"),
        ({"importance": None}, PlanError, "needs groups="),
        ({"rule": "best"}, PlanError, "rule must be one of"),
        ({"rule": "quantile"}, PlanError, "shares= are for"),
        ({"shares": (1,)}, PlanError, "shares= are for"),
        ({"rule": "quantile", "shares": (1, 1)}, PlanError, "a number of at least 0 for each width"),
        (
            {"rule": "quantile", "shares": (0,) * 6 + (1,)},
            BudgetError,
            r"come to 7\.\d+ bits a weight, above average_bits=3",
        ),
    ],
)
def test_bad_options_are_told(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        allocate(model(), 3.0, **options)


def test_a_budget_below_the_least_is_told() -> None:
    with pytest.raises(BudgetError, match=r"average_bits=1\.5 cannot be met: the least possible is 2"):
        allocate(model(), 1.5)
    with pytest.raises(BudgetError, match="takes the limit average_bits alone"):
        fb.allocate(model(), fb.Budget(size_mb=1), method="fair", quantizer="maxabs", importance=importance(model()))
