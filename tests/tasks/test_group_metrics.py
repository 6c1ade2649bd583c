from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbits.errors import DataError
from fewbits.tasks.group_metrics import (
    class_rates,
    fairlearn_metrics,
    group_changes,
    group_metrics,
    signed_differences,
    worst_change,
)

LABELS = torch.tensor([1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0])
ANSWERS = torch.tensor([1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0])
GROUPS = torch.tensor([0] * 6 + [1] * 5 + [2] * 4)
NAMES = ("zero", "one", "two")


def test_golden_of_two_classes_and_three_groups() -> None:
    found = group_metrics(ANSWERS, LABELS, GROUPS, 2, NAMES)
    assert list(found["acc_groups"].values()) == pytest.approx([66.6667, 80, 25], abs=1e-4)
    assert found["acc"] == pytest.approx(60) and found["acc_group_mean"] == pytest.approx(57.22222, abs=1e-5)
    assert (found["acc_worst"], found["worst"]) == (25, "two")
    assert found["acc_gap_paper"] == pytest.approx(32.22222, abs=1e-5) and found["acc_gap"] == pytest.approx(55)
    _, rates = class_rates(ANSWERS, LABELS, GROUPS, 2, 3)
    assert rates["tpr"][1].tolist() == pytest.approx([2 / 3, 1 / 2, 0])
    assert (1 - rates["tnr"][1]).tolist() == pytest.approx([1 / 3, 0, 2 / 3])
    assert found["eopp0"] == pytest.approx(0.666667, abs=1e-5) and found["eopp1"] == pytest.approx(0.666667, abs=1e-5)
    assert found["eodd_sum"] == pytest.approx(1.333333, abs=1e-5)
    assert found["counts"] == {"zero": [3, 3], "one": [3, 2], "two": [3, 1]} and found["classes_counted"] == 2


def test_a_group_without_a_class_is_left_out_and_not_counted_as_failing() -> None:
    labels = LABELS.clone()
    labels[11] = 0
    found = group_metrics(ANSWERS, labels, GROUPS, 2, NAMES)
    _, rates = class_rates(ANSWERS, labels, GROUPS, 2, 3)
    assert rates["tpr"][1, 2].isnan() and rates["tnr"][0, 2].isnan()
    # of class 1: TPR (2/3, 1/2, -), FPR (1/3, 0, 1/2); of class 0 the same with sides changed
    assert found["eopp1"] == pytest.approx((1 / 6 + 1 / 2) / 2) and found["eopp0"] == pytest.approx((1 / 2 + 1 / 6) / 2)
    assert found["eodd_sum"] == pytest.approx(0.666667, abs=1e-5)
    assert found["acc_group_mean"] == pytest.approx(65.5556, abs=1e-4) and found["acc_worst"] == pytest.approx(50)
    assert fairlearn_metrics(ANSWERS, labels, GROUPS, 2, NAMES)["equal_opportunity_difference"] == pytest.approx(2 / 3)


def test_the_least_number_of_examples_of_a_class() -> None:
    assert group_metrics(ANSWERS, LABELS, GROUPS, 2, NAMES, least=3)["classes_counted"] == 1
    assert group_metrics(ANSWERS, LABELS, GROUPS, 2, NAMES, least=4)["classes_counted"] == 0


def test_fairlearns_own_conventions() -> None:
    found = fairlearn_metrics(ANSWERS, LABELS, GROUPS, 2, NAMES)
    assert found["equal_opportunity_difference"] == pytest.approx(2 / 3)
    assert found["equalized_odds_difference"] == pytest.approx(2 / 3)
    assert found["equalized_odds_difference_mean"] == pytest.approx(2 / 3)
    assert found["demographic_parity_difference"] == pytest.approx(0.3)


def test_aif360s_signed_conventions() -> None:
    found = signed_differences(ANSWERS, LABELS, GROUPS, 0, 1)
    assert found["equal_opportunity_difference"] == pytest.approx(1 / 6)
    assert found["average_odds_difference"] == pytest.approx(0.25)
    assert found["average_abs_odds_difference"] == pytest.approx(0.25)
    turned = signed_differences(ANSWERS, LABELS, GROUPS, 1, 0)
    assert turned["average_odds_difference"] == pytest.approx(-0.25) and turned["average_abs_odds_difference"] > 0


def test_odds_are_the_sum_of_both_opportunities_where_all_rates_are_defined() -> None:
    for _ in range(20):
        labels = torch.cat([torch.arange(4).repeat(3), torch.randint(4, (60,))])
        groups = torch.cat([torch.arange(3).repeat_interleave(4), torch.randint(3, (60,))])
        found = group_metrics(torch.randint(4, (72,)), labels, groups, 4, NAMES)
        assert found["eodd_sum"] == pytest.approx(found["eopp0"] + found["eopp1"])
        assert found["classes_counted"] == 4


def test_unknown_groups_are_left_out() -> None:
    groups = GROUPS.clone()
    groups[GROUPS == 2] = -1
    assert group_metrics(ANSWERS, LABELS, groups, 2, NAMES)["worst"] == "zero"
    with pytest.raises(DataError, match="no example has a known group"):
        group_metrics(ANSWERS, LABELS, torch.full_like(GROUPS, -1), 2, NAMES)


def test_the_change_of_each_group_and_its_interval() -> None:
    before, after = torch.ones(400, dtype=torch.bool), torch.ones(400, dtype=torch.bool)
    groups = torch.arange(400) % 2
    after[:100:2] = False  # 50 of the 200 of group 0
    found = group_changes(before, after, groups, ("a", "b"))
    assert found["a"]["change"] == -25 and found["b"] == {"change": 0, "low": 0, "high": 0}
    half = 1.96 * 100 * (0.25 * 0.75 / 200) ** 0.5  # of a share of 0.25 of 200
    assert found["a"]["low"] == pytest.approx(-25 - half, abs=1) and found["a"]["high"] == pytest.approx(
        -25 + half, abs=1
    )
    assert worst_change(found) == ("a", -25)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": LABELS[:3]}, r"must all be \[examples\]"),
        ({"labels": LABELS + 1}, "labels must be below 2, got 1 to 2"),
        ({"groups": GROUPS + 1}, "groups must be below 3"),
    ],
)
def test_what_does_not_fit_is_told(changes: dict[str, Tensor], words: str) -> None:
    given = {"predicted": ANSWERS, "labels": LABELS, "groups": GROUPS} | changes
    with pytest.raises(DataError, match=words):
        group_metrics(**given, classes=2, names=NAMES)
