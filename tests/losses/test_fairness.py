from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from fewbits.errors import TrainingError
from fewbits.losses.fairness import GroupFairness, group_means

GROUPS = torch.tensor([0, 0, 1, 1, 2, 2, -1])


def losses() -> Tensor:
    return torch.tensor([1.0, 3.0, 4.0, 6.0, 0.5, 0.5, 100.0], requires_grad=True)


def term(mode: str, **options: float) -> GroupFairness:
    return GroupFairness("abc", mode, least=1, **options)


def gradient(fairness: GroupFairness) -> tuple[float, Tensor]:
    each = losses()
    value = fairness(each, GROUPS)
    value.backward()
    assert each.grad is not None
    return float(value.detach()), each.grad


def test_group_means_leave_out_the_unknown_and_the_few() -> None:
    means, there = group_means(losses(), GROUPS, 3)
    assert means.tolist() == [2.0, 5.0, 0.5] and there.tolist() == [0, 1, 2]
    means, there = group_means(losses(), torch.tensor([0, 1, 1, 1, 2, 2, -1]), 3, least=2)
    assert there.tolist() == [1, 2] and means.tolist() == [pytest.approx(13 / 3), 0.5]


def test_gap_without_gradient_through_the_best_has_its_value_and_the_gradient_of_the_worst() -> None:
    value, by_gap = gradient(term("gap", weight=1.0))
    stopped, by_stopped = gradient(term("gap_sg", weight=1.0))
    worst, by_worst = gradient(term("worst", weight=1.0))
    assert value == stopped == 4.5 and worst == 5.0
    assert torch.equal(by_stopped, by_worst) and by_worst.tolist() == [0, 0, 0.5, 0.5, 0, 0, 0]
    assert by_gap.tolist() == [0, 0, 0.5, 0.5, -0.5, -0.5, 0]


def test_weight_and_ramp_scale_the_term() -> None:
    fairness = term("worst", weight=0.5)
    fairness.ramp = 0.1
    assert gradient(fairness)[0] == pytest.approx(0.25)


def test_dro_moves_its_weights_to_the_worst_group_and_saves_them() -> None:
    fairness = term("dro", weight=1.0, rate=0.5)
    value, _ = gradient(fairness)
    raised = [math.exp(0.5 * mean) for mean in (2.0, 5.0, 0.5)]
    shares = [r / sum(raised) for r in raised]
    assert fairness.shares_of_worst.tolist() == pytest.approx(shares)
    assert value == pytest.approx(sum(s * m for s, m in zip(shares, (2.0, 5.0, 0.5))), rel=1e-6)
    again = term("dro", weight=1.0, rate=0.5)
    again.load_state_dict(fairness.state_dict())
    assert gradient(again)[0] == gradient(fairness)[0]


def test_nothing_is_added_where_one_group_is_there() -> None:
    value = GroupFairness("abc", least=2)(losses(), torch.tensor([0, 0, 0, 1, 2, -1, -1]))
    assert value == 0 and value.requires_grad


def test_warnings_of_one_group_and_of_a_gap_that_levels_down() -> None:
    with pytest.warns(UserWarning, match="inactive"):
        GroupFairness(["all"])
    shares = {"light": 0.69, "dark": 0.31}
    with pytest.warns(UserWarning, match=r"dark \(0\.31\).*'gap_sg', or a weight below 0\.31"):
        GroupFairness(shares, "gap", shares=shares)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GroupFairness(shares, "gap", 0.3, shares=shares)
        GroupFairness(shares, "gap_sg", shares=shares)


@pytest.mark.parametrize("options", [{"mode": "gaps"}, {"weight": 0.0}, {"least": 0}, {"rate": float("nan")}])
def test_values_out_of_range_are_told(options: dict[str, object]) -> None:
    with pytest.raises(TrainingError, match="fairness term"):
        GroupFairness("ab", **options)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="must both be"):
        GroupFairness("ab")(torch.zeros(3), torch.zeros(2, dtype=torch.long))
