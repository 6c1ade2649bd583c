"""Budgets and their bad inputs."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from fewbits.allocate import Budget, plan_costs, uniform_plan
from fewbits.cost import model_shape
from fewbits.errors import BudgetError


def test_limits_are_those_given() -> None:
    assert Budget(size_mb=2.5).limits == {"size_bytes": 2_500_000}
    assert Budget(size_mb=0.1).limits == {"size_bytes": 100_000}  # no rounding of binary fractions
    assert Budget(average_bits=2.5, bops=7).limits == {"average_bits": 2.5, "bops": 7}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "at least one limit"),
        ({"size_mb": 1, "size_bytes": 1_000_000}, "the same limit"),
        ({"average_bits": 0}, "average_bits must be a positive number, got 0"),
        ({"bops": float("nan")}, "bops must be a positive number"),
        ({"size_bytes": "3 MB"}, "size_bytes must be a positive number, got '3 MB'"),
    ],
)
def test_bad_budgets(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**given)


def test_exceeded_names_cost_and_limit() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    costs = plan_costs(uniform_plan(model, 2), model_shape(model))
    assert costs["average_bits"] == pytest.approx((8 + 2 + 8) / 3)
    assert Budget(average_bits=6).exceeded(costs) == {}
    assert Budget(average_bits=5).exceeded(costs) == {"average_bits": (6, 5)}
    assert "bops" not in costs
