"""Maps by chance and by the order of sigma."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from torch import nn

from fewbits.allocate import Budget, allocate, plan_costs
from fewbits.cost import model_shape
from fewbits.errors import BudgetError, PlanError, QuantizationError
from fewbits.plan import Plan

MENU = (2, 4, 6, 8)
BITS = (2.1, 3.3, 4.0, 5.7, 8.0)


def net(layers: int = 9) -> nn.Sequential:
    """Return layers of growing size whose sigma falls and rises."""
    model = nn.Sequential(*(nn.Linear(8 + 2 * i, 10 + 2 * i) for i in range(layers)))
    for i, layer in enumerate(model):
        nn.init.normal_(layer.weight, std=0.05 + 0.1 * ((i * 5) % layers))
    return model


def bits(plan: Plan) -> list[int]:
    return [layer.weight.bits for _, layer in plan if layer is not None and layer.weight is not None]


def sigmas(model: nn.Module) -> list[float]:
    return [statistics.pstdev(m.weight.flatten().tolist()) for m in model.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("average", BITS)
@pytest.mark.parametrize(("method", "sign"), [("sigma_order", 1), ("reversed_sigma", -1)])
def test_bits_follow_the_order_of_sigma_and_spend_the_budget(method: str, sign: int, average: float) -> None:
    model = net()
    plan = allocate(model, Budget(average_bits=average), method=method, menu=MENU, first_last=None)
    order = sorted(range(9), key=lambda i: sign * sigmas(model)[i])
    ranked = [bits(plan)[i] for i in order]
    assert ranked == sorted(ranked) and set(ranked) <= set(MENU)
    shape = model_shape(model)
    assert plan_costs(plan, shape)["average_bits"] <= average
    for place, i in enumerate(order):  # one more step anywhere breaks the budget or the order
        if ranked[place] < (ranked[place + 1] if place < 8 else 8):
            raised = list(bits(plan))
            raised[i] = MENU[MENU.index(raised[i]) + 1]
            weights = [m.weight.numel() for m in model]
            assert sum(b * n for b, n in zip(raised, weights)) > average * sum(weights)
    assert plan.decided_from["sigma"]["3"] == pytest.approx(sigmas(model)[3], rel=1e-5)


def test_groups_are_even_where_the_budget_is_the_middle_of_the_menu() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(8)))
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight.copy_((i + 1) * torch.linspace(-1, 1, 64).reshape(8, 8))
    plan = allocate(model, Budget(average_bits=5), method="sigma_order", menu=MENU, first_last=None)
    assert bits(plan) == [2, 2, 4, 4, 6, 6, 8, 8]


def test_the_ends_stand_aside() -> None:
    plan = allocate(net(), Budget(average_bits=5), method="sigma_order", menu=MENU, first_last=6)
    assert bits(plan)[0] == bits(plan)[-1] == 6


@pytest.mark.parametrize("average", BITS)
def test_a_random_map_spends_the_budget_and_repeats_by_its_seed(average: float) -> None:
    model, shape = net(), model_shape(net())

    def draw(seed: int) -> Plan:
        budget = Budget(average_bits=average, size_bytes=10**9)
        return allocate(model, budget, method="random", menu=MENU, seed=seed, first_last=None)

    plans = [draw(seed) for seed in range(20)]
    assert draw(3) == plans[3] and plans[3].decided_from["seed"] == 3
    maps = {tuple(bits(plan)) for plan in plans}
    least = {2.1: 2, 8.0: 1}.get(average, 8)
    assert len(maps) >= least and (average < 8 or len(maps) == 1)
    weights = [layer.numel for layer in shape.layers]
    for plan in plans:
        assert plan_costs(plan, shape)["average_bits"] <= average
        spent = sum(b * n for b, n in zip(bits(plan), weights))
        open_steps = [2 * n for b, n in zip(bits(plan), weights) if b < 8]
        assert not open_steps or spent + min(open_steps) > average * sum(weights) >= spent


def test_a_random_map_visits_every_width_of_every_layer() -> None:
    model = net(5)
    budget = Budget(average_bits=5)
    plans = [allocate(model, budget, method="random", menu=(2, 4, 8), seed=s, first_last=None) for s in range(60)]
    for column in zip(*map(bits, plans)):
        assert set(column) == {2, 4, 8}


@pytest.mark.parametrize("method", ["random", "sigma_order", "reversed_sigma"])
def test_what_cannot_be_met_is_said(method: str) -> None:
    with pytest.raises(BudgetError, match=r"least possible is 2 "):
        allocate(net(), Budget(average_bits=1.5), method=method, menu=MENU, first_last=None)
    with pytest.raises(BudgetError, match="size_bytes"):
        allocate(net(), Budget(average_bits=4, size_bytes=100), method=method, menu=MENU)
    with pytest.raises(PlanError, match="has no option 'sead'"):
        allocate(net(), Budget(average_bits=4), method=method, menu=MENU, sead=1)


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match="'2'"):
        allocate(model, Budget(average_bits=4), method="sigma_order", menu=MENU)


def test_equal_sigmas_go_by_the_order_of_the_model() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(6)))
    for layer in model:
        nn.init.constant_(layer.weight, 0.5)
    for method in ("sigma_order", "reversed_sigma"):
        found = bits(allocate(model, Budget(average_bits=4), method=method, menu=MENU, first_last=None))
        assert all(a <= b for a, b in itertools.pairwise(found))
