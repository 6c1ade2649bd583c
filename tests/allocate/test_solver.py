"""The solver against brute force, and against an integer program on the layers of ResNet-50."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fewbits.allocate import Style, solve, weight_mse
from fewbits.allocate.sensitivity import style_error
from fewbits.errors import BudgetError

Rows = list[list[float]]


@st.composite
def problems(draw: Any) -> tuple[Rows, Rows, int]:
    """Ragged menus: with ties, zero costs, and neither monotone nor convex."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    unit = draw(st.sampled_from([1.0, 0.1, 1e-6, 1e6]))
    cost = [draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)) for n in lengths]
    distortion = [[unit * draw(st.integers(0, 20)) for _ in range(n)] for n in lengths]
    return cost, distortion, draw(st.integers(0, 40))


def brute_force(cost: Rows, distortion: Rows, budget: float) -> float:
    options = itertools.product(*(range(len(row)) for row in cost))
    return min(
        sum(d[j] for d, j in zip(distortion, choice))
        for choice in options
        if sum(c[j] for c, j in zip(cost, choice)) <= budget
    )


@settings(max_examples=300)
@given(problems())
def test_it_finds_what_brute_force_finds(problem: tuple[Rows, Rows, int]) -> None:
    cost, distortion, budget = problem
    assume(sum(min(row) for row in cost) <= budget)
    solution = solve(cost, distortion, budget)
    best = brute_force(cost, distortion, budget)
    assert solution.distortion == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert solution.optimal and solution.bound <= solution.distortion
    assert solution.cost == sum(row[j] for row, j in zip(cost, solution.choice)) <= budget
    assert solution.distortion == pytest.approx(sum(row[j] for row, j in zip(distortion, solution.choice)))


@settings(max_examples=100)
@given(problems(), st.integers(1, 3))
def test_with_few_states_it_stays_feasible_and_its_bound_holds(problem: tuple[Rows, Rows, int], states: int) -> None:
    cost, distortion, budget = problem
    assume(sum(min(row) for row in cost) <= budget)
    solution = solve(cost, distortion, budget, max_states=states)
    best = brute_force(cost, distortion, budget)
    assert solution.cost <= budget
    assert solution.bound * (1 - 1e-9) - 1e-12 <= best <= solution.distortion * (1 + 1e-9)


def least_by_table(cost: Any, distortion: Any, budget: int) -> float:
    """Return the least distortion by the textbook table over every integer cost."""
    least = np.zeros(budget + 1)
    for prices, losses in zip(cost, distortion):
        after = np.full(budget + 1, np.inf)
        for price, loss in zip(prices, losses):
            after[price:] = np.minimum(after[price:], least[: budget + 1 - price] + loss)
        least = after
    return float(least[budget])


@pytest.mark.parametrize("seed", range(8))
def test_thirty_layers_against_the_textbook_table(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost = rng.integers(1, 60, (30, 1)) * np.array([2, 3, 4, 6, 8])
    distortion = rng.lognormal(size=(30, 1)) * 4.0 ** -np.array([2, 3, 4, 6, 8]) * rng.uniform(0.5, 2, (30, 5))
    for share in (0.1, 0.3, 0.6):
        budget = int(cost[:, 0].sum() * (1 - share) + cost[:, -1].sum() * share)
        best = least_by_table(cost, distortion, budget)
        whole, narrow = solve(cost, distortion, budget), solve(cost, distortion, budget, max_states=2)
        assert whole.optimal and whole.distortion == pytest.approx(best, rel=1e-9)
        assert narrow.cost <= budget and narrow.bound <= best * (1 + 1e-9) <= narrow.distortion * (1 + 2e-9)


def test_tolerance_stops_early_within_its_promise() -> None:
    rng = np.random.default_rng(0)
    cost, distortion = rng.integers(1, 50, (40, 5)), rng.random((40, 5))
    solution = solve(cost, distortion, 700, tolerance=0.5)
    assert solution.distortion <= 1.5 * solution.bound
    assert solution.distortion >= solve(cost, distortion, 700).distortion


def test_many_equal_layers_do_not_blow_up() -> None:
    menu = [2, 3, 4, 6, 8]
    solution = solve([menu] * 100, [[4.0**-b for b in menu]] * 100, 433)
    assert solution.optimal and solution.cost <= 433


def test_a_generous_budget_takes_the_least_distortion_at_the_least_cost() -> None:
    assert solve([[5, 3, 1], [0, 2]], [[1, 1, 2], [1, 1]], 1000).choice == (1, 0)


def test_an_impossible_budget_says_the_minimum() -> None:
    with pytest.raises(BudgetError, match="below the least possible cost 9"):
        solve([[4, 8], [5, 6]], [[1, 0], [1, 0]], 8)
    assert solve([[4, 8], [5, 6]], [[1, 0], [1, 0]], 9).choice == (0, 0)


@pytest.mark.parametrize(
    ("cost", "distortion", "message"),
    [
        ([], [], "no layer"),
        ([[]], [[]], "layer 0 needs one finite number"),
        ([[1], [1]], [[1], [float("nan")]], "distortion of layer 1"),
        ([[1, 2], [1]], [[1], [1, 2]], "same lengths"),
    ],
)
def test_malformed_tables(cost: Rows, distortion: Rows, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        solve(cost, distortion, 10)


def integer_program(cost: Any, distortion: Any, budget: float) -> float:
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, options = cost.shape
    one_each = LinearConstraint(np.kron(np.eye(layers), np.ones(options)), 1, 1)
    within = LinearConstraint(cost.reshape(1, -1), -np.inf, budget)
    result = milp(
        distortion.ravel(), constraints=[one_each, within], integrality=np.ones(cost.size), bounds=Bounds(0, 1)
    )
    assert result.status == 0
    return float(result.fun)


def seconds(run: Any, times: int) -> tuple[float, Any]:
    """Return the least CPU time of several runs, which other work on the machine hardly moves, and the last result."""
    spent = []
    for _ in range(times):
        start = time.process_time()
        result = run()
        spent.append(time.process_time() - start)
    return min(spent), result


def test_resnet50_as_good_as_an_integer_program_and_twenty_times_faster() -> None:
    """Random weights; cost: bytes of codes, distortion: summed squared error. Times are summed over the budgets."""
    models = pytest.importorskip("torchvision.models")
    model, menu = models.resnet50(), (2, 3, 4, 6, 8)
    plain = style_error(Style(range="minmax"))
    errors = weight_mse(model, menu, relative=False, quantize_error=plain, sample=1 << 15)
    sizes = [model.get_submodule(name).weight.numel() for name in errors]
    cost = np.array([[-(-n * bits // 8) for bits in menu] for n in sizes], dtype=float)
    distortion = np.array(list(errors.values()))
    low, high = cost.min(1).sum(), cost.max(1).sum()
    ours, theirs = 0.0, 0.0
    for share in (0.1, 0.35, 0.5, 0.65, 0.8):
        budget = low + share * (high - low)
        spent, optimum = seconds(lambda b=budget: integer_program(cost, distortion, b), 1)
        theirs += spent
        spent, solution = seconds(lambda b=budget: solve(cost, distortion, b), 5)
        ours += spent
        assert solution.cost <= budget
        assert solution.distortion <= 1.01 * optimum
    assert theirs >= 20 * ours, f"{theirs:.3f} s against {ours:.3f} s"
