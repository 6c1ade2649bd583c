"""Allocation end to end: budgets are met, errors help, methods plug in."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbits
from fewbits.allocate import METHODS, Budget, Problem, allocate, allocator, plan_costs, solve, weight_mse
from fewbits.cost import model_shape, size
from fewbits.errors import BudgetError, PlanError, QuantizationError
from fewbits.plan import Plan

EXAMPLE = torch.linspace(-2, 2, 192).reshape(1, 3, 8, 8)


def net(width: int = 16) -> nn.Sequential:
    def block(inside: int, outside: int) -> list[nn.Module]:
        return [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]

    layers = [*block(3, width), *block(width, 2 * width), *block(2 * width, width), *block(width, width)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def bits(plan: Plan) -> list[int]:
    return [layer.weight.bits for _, layer in plan if layer is not None and layer.weight is not None]


@pytest.mark.parametrize("method", ["uniform", "solver"])
@pytest.mark.parametrize("limit", ["size_bytes", "average_bits", "bops"])
def test_each_limit_is_met_and_used(method: str, limit: str) -> None:
    model = net()
    shape = model_shape(model, EXAMPLE)

    def costs(menu: int) -> float:
        plan = allocate(model, Budget(size_mb=9), example=EXAMPLE, menu=[menu], act_bits=8, method="uniform")
        return plan_costs(plan, shape)[limit]

    budget = Budget(**{limit: int(costs(4) + 0.3 * (costs(6) - costs(4))) if limit != "average_bits" else 4.9})
    plan = allocate(model, budget, method=method, example=EXAMPLE, act_bits=8)
    spent = plan_costs(plan, shape)[limit]
    assert spent <= budget.limits[limit]
    told = plan.decided_from
    assert (told["method"], told["budget"], told["predicted"][limit]) == (method, budget.limits, spent)
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict()
    if method == "uniform":
        assert bits(plan) == [8, 4, 4, 4, 8]
    else:
        assert spent > costs(4) and len(set(bits(plan)[1:-1])) > 1


def test_the_solver_takes_the_least_distortion_of_all_plans_in_the_budget() -> None:
    model = net(4)
    shape, menu = model_shape(model, EXAMPLE), (2, 4, 8)
    budget = Budget(size_bytes=1150)
    plan = allocate(model, budget, example=EXAMPLE, menu=menu, first_last=None)
    errors = weight_mse(model, menu)

    def distortion(widths: list[int]) -> float:
        return sum(row[menu.index(b)] for row, b in zip(errors.values(), widths))

    names = [name for name, _ in plan]
    best = min(
        distortion(widths)
        for widths in ([a, b, c, d, e] for a in menu for b in menu for c in menu for d in menu for e in menu)
        if size(rewidth(plan, names, widths), shape).total <= 1150
    )
    assert distortion(bits(plan)) == pytest.approx(best)
    assert plan.decided_from["distortion"] == pytest.approx(best)


def rewidth(plan: Plan, names: list[str], widths: list[int]) -> Plan:
    from dataclasses import replace

    rules = []
    for (name, layer), width in zip(plan, widths):
        assert layer is not None and layer.weight is not None
        rules.append((name, replace(layer, weight=replace(layer.weight, bits=width))))
    return Plan(tuple(rules))


def test_fisher_prefers_the_layers_that_the_loss_feels() -> None:
    model = net()
    with torch.no_grad():
        model[4].weight.zero_()  # its norm's bias alone goes on: nothing before it matters
        model[4].bias.fill_(1.0)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    batches = [(torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,))) for _ in range(2)]
    options: dict[str, Any] = {"sensitivity": "fisher", "batches": batches, "loss": loss, "first_last": None}
    plan = allocate(model, Budget(average_bits=4), **options)
    assert bits(plan)[0] == 2 and bits(plan)[3] > 2
    assert plan.decided_from["sensitivity"] == "fisher"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(40, 8), nn.Linear(8, 8), nn.Linear(8, 40)
        self.head.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(self.embed(index)))
        return out


@pytest.mark.parametrize("first_last", [None, 4])
def test_layers_that_share_a_weight_share_its_bits_and_its_bytes(first_last: int | None) -> None:
    model, index = Tied(), torch.zeros(1, 3, dtype=torch.long)
    shape = model_shape(model, index)
    for limit in (700, 800, 900):
        plan = allocate(model, Budget(size_bytes=limit), example=index, act_bits=8, first_last=first_last)
        embed, _, head = bits(plan)
        assert embed == head and size(plan, shape).total <= limit
        fewbits.quantize(Tied(), plan, verbose=False)


def test_a_budget_below_what_is_possible_says_the_minimum() -> None:
    model = net()
    for method in ("solver", "uniform"):
        with pytest.raises(BudgetError, match=r"least possible is [0-9]") as caught:
            allocate(model, Budget(size_bytes=100), method=method)
        words = str(caught.value).split("least possible is ")[1]
        least = int(words.split()[0].rstrip(";").replace(",", ""))
        assert size(allocate(model, Budget(size_bytes=least), method=method), model_shape(model)).total == least
        with pytest.raises(BudgetError):
            allocate(model, Budget(size_bytes=least - 1), method=method)
    with pytest.raises(BudgetError, match=r"average_bits=1.5.*least possible is 2 "):
        allocate(model, Budget(average_bits=1.5), first_last=None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "solvr"}, PlanError, r"unknown allocation method 'solvr'; did you mean 'solver'.*known: \['"),
        ({"tolerence": 1}, PlanError, "no option 'tolerence'; did you mean 'tolerance'"),
        ({"method": "uniform", "loss": sum}, PlanError, "method 'uniform' has no option 'loss'"),
        ({"menu": (4, 9)}, PlanError, r"menu of weight bits holds some of .*got \(4, 9\)"),
        ({"menu": ()}, PlanError, "menu of weight bits"),
        ({"act_bits": 12}, PlanError, "act_bits must be one of .*got 12"),
        ({"granularity": "block"}, PlanError, "give both or neither"),
        ({"sensitivity": "fischer"}, PlanError, "did you mean 'fisher'"),
        ({"sensitivity": "fisher"}, PlanError, "needs batches= and loss="),
        ({"loss": sum}, PlanError, "drop .'loss'."),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        allocate(net(), Budget(size_mb=1), **options)


def test_more_bad_input() -> None:
    with pytest.raises(QuantizationError, match="no quantizable layer"):
        allocate(nn.ReLU(), Budget(size_mb=1))
    with pytest.raises(BudgetError, match="give example="):
        allocate(net(), Budget(bops=1e6))
    with pytest.raises(BudgetError, match="takes one limit"):
        allocate(net(), Budget(size_mb=1, average_bits=4))
    both = allocate(net(), Budget(size_mb=1, average_bits=4.9), method="uniform")
    assert both.decided_from["weight_bits"] == 4


def test_a_new_method_is_one_function() -> None:
    @allocator("least")
    def least(problem: Problem, *, extra: int = 0) -> Plan:
        widths = {owner: min(choices) for owner, choices in problem.choices().items()}
        return problem.plan(problem.spread(widths), "least", extra=extra)

    try:
        plan = allocate(net(), Budget(size_mb=1), method="least", extra=3)
        assert bits(plan) == [8, 2, 2, 2, 8]
        assert (plan.decided_from["method"], plan.decided_from["extra"]) == ("least", 3)
        with pytest.raises(PlanError, match="registered already"):
            allocator("least")(solve)
    finally:
        del METHODS["least"]


def test_the_folder_and_the_function_of_one_name() -> None:
    import importlib

    folder: Any = importlib.import_module("fewbits.allocate")
    assert callable(folder) and bits(folder(net(), Budget(average_bits=8))) == [8] * 5
    assert bits(fewbits.allocate(net(), Budget(average_bits=8))) == [8] * 5
