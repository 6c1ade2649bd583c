"""How a classifier serves each group: accuracies, gaps, equal opportunity and odds, and what quantization took.

Conventions after FairQuant (arXiv 2602.23192) and its forerunners, and after fairlearn; the two differ, and are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.errors import DataError

Rates = Tensor  # [classes, groups], NaN where there is nothing to count


def group_metrics(
    predicted: Tensor, labels: Tensor, groups: Tensor, classes: int, names: Sequence[str], *, least: int = 1
) -> dict[str, Any]:
    """Return how well each group is served. predicted, labels, groups: int64 [N]; a group below 0 is unknown, left out.

    In percent: ``acc`` of all examples, ``acc_groups`` {name: accuracy}, their plain mean ``acc_group_mean``, the least
    ``acc_worst`` with its name ``worst``, ``acc_gap`` (largest less least) and ``acc_gap_paper`` (mean less least).
    In 0..1, means over classes of the largest less the least group's rate: ``eopp1`` of true positives, ``eopp0`` of
    true negatives, ``dp`` of being answered; ``eodd_sum`` (eopp0 + eopp1, as in the paper) and ``eodd_max`` (of each
    class the larger one, as fairlearn's worst case). A rate that nothing defines is left out; a class counts where two
    groups have ``least`` examples of it: ``classes_counted``. ``counts``: {name: examples of each class}.
    Raises DataError for shapes that differ, labels out of range, and where no group has an example.
    """
    known = _checked(predicted, labels, groups, classes, len(names))
    predicted, labels, groups = predicted[known], labels[known], groups[known]
    right = (predicted == labels).double()
    sizes = torch.bincount(groups, minlength=len(names))
    there = [i for i in range(len(names)) if sizes[i]]
    accuracy = {names[i]: 100 * float(right[groups == i].mean()) for i in there}
    worst = min(accuracy, key=lambda name: accuracy[name])
    mean = sum(accuracy.values()) / len(accuracy)
    positives, rates = class_rates(predicted, labels, groups, classes, len(names))
    counted = (positives >= least).sum(1) >= 2
    gap = {name: _gap(rate) for name, rate in rates.items()}
    odds = torch.fmax(gap["tpr"], gap["tnr"])
    return {
        "acc": 100 * float(right.mean()),
        "acc_groups": accuracy,
        "acc_group_mean": mean,
        "acc_worst": accuracy[worst],
        "worst": worst,
        "acc_gap": max(accuracy.values()) - accuracy[worst],
        "acc_gap_paper": mean - accuracy[worst],
        "eopp1": _mean(gap["tpr"][counted]),
        "eopp0": _mean(gap["tnr"]),
        "eodd_sum": _mean(gap["tpr"][counted]) + _mean(gap["tnr"]),
        "eodd_max": _mean(odds),
        "dp": _mean(gap["answered"]),
        "classes_counted": int(counted.sum()),
        "counts": {names[i]: torch.bincount(labels[groups == i], minlength=classes).tolist() for i in there},
    }


def class_rates(
    predicted: Tensor, labels: Tensor, groups: Tensor, classes: int, count: int
) -> tuple[Tensor, dict[str, Rates]]:
    """Return examples of each class and group, [classes, groups], and the rates tpr, tnr and answered of each class."""
    cells = torch.zeros(count, classes, classes, dtype=torch.float64)  # by group, true class, answer
    cells.view(-1).index_add_(
        0, groups * classes**2 + labels * classes + predicted, torch.ones(len(labels), dtype=torch.float64)
    )
    hits, true, answered = cells.diagonal(dim1=1, dim2=2).T, cells.sum(2).T, cells.sum(1).T
    total = cells.sum((1, 2))
    negative = total - true
    # division by zero leaves NaN: a rate that nothing defines
    rates = {"tpr": hits / true, "tnr": (negative - answered + hits) / negative, "answered": answered / total}
    return true, rates


def fairlearn_metrics(
    predicted: Tensor, labels: Tensor, groups: Tensor, classes: int, names: Sequence[str]
) -> dict[str, float]:
    """Return fairlearn's differences between groups, one against rest and averaged over the classes (two classes: of
    class 1 alone). Its own convention: a group without positives has a true positive rate of 0, which widens the gap.
    """
    from fairlearn.metrics import (  # type: ignore[import-untyped]
        demographic_parity_difference,
        equal_opportunity_difference,
        equalized_odds_difference,
    )

    known = _checked(predicted, labels, groups, classes, len(names))
    sensitive = groups[known].numpy()
    found: dict[str, list[float]] = {}
    for positive in [1] if classes == 2 else range(classes):
        given = {
            "y_true": (labels[known] == positive).long().numpy(),
            "y_pred": (predicted[known] == positive).long().numpy(),
            "sensitive_features": sensitive,
        }
        for name, value in (
            ("equal_opportunity_difference", equal_opportunity_difference(**given)),
            ("equalized_odds_difference", equalized_odds_difference(**given)),
            ("equalized_odds_difference_mean", equalized_odds_difference(**given, agg="mean")),
            ("demographic_parity_difference", demographic_parity_difference(**given)),
        ):
            found.setdefault(name, []).append(float(value))
    return {name: sum(values) / len(values) for name, values in found.items()}


def signed_differences(
    predicted: Tensor, labels: Tensor, groups: Tensor, unprivileged: int, privileged: int
) -> dict[str, float]:
    """Return AIF360's differences of two groups of a binary classifier, unprivileged less privileged, positive class 1.

    equal_opportunity_difference of true positive rates, average_odds_difference (half the sum of the differences of
    false and true positive rates) and average_abs_odds_difference (half the sum of their magnitudes). NaN where a group
    lacks a class.
    """
    count = max(unprivileged, privileged, int(groups.max())) + 1
    known = _checked(predicted, labels, groups, 2, count)
    _, rates = class_rates(predicted[known], labels[known], groups[known], 2, count)
    tpr, fpr = rates["tpr"][1], 1 - rates["tnr"][1]
    by_tpr, by_fpr = (float(rate[unprivileged] - rate[privileged]) for rate in (tpr, fpr))
    return {
        "equal_opportunity_difference": by_tpr,
        "average_odds_difference": (by_fpr + by_tpr) / 2,
        "average_abs_odds_difference": (abs(by_fpr) + abs(by_tpr)) / 2,
    }


def group_changes(
    before: Tensor, after: Tensor, groups: Tensor, names: Sequence[str], *, draws: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Return for each group {name: {change, low, high}} in points: accuracy after less before, and its 95 % interval.

    before, after: whether each example is answered right, bool [N], by the float and by the quantized model. The
    interval is that of a paired bootstrap within the group (Efron 1979) of ``draws`` resamples.
    """
    difference = (after.double() - before.double()).numpy()
    generator, found = np.random.default_rng(seed), {}
    for i, name in enumerate(names):
        own = difference[(groups == i).numpy()]
        if not len(own):
            continue
        values, counts = np.unique(own, return_counts=True)
        drawn = generator.multinomial(len(own), counts / len(own), size=draws) @ values / len(own)
        low, high = np.quantile(drawn, (0.025, 0.975))
        found[name] = {"change": 100 * float(own.mean()), "low": 100 * float(low), "high": 100 * float(high)}
    return found


def worst_change(changes: Mapping[str, Mapping[str, float]]) -> tuple[str, float]:
    """Return the group that lost most, and its change in points."""
    name = min(changes, key=lambda group: changes[group]["change"])
    return name, changes[name]["change"]


def _checked(predicted: Tensor, labels: Tensor, groups: Tensor, classes: int, count: int) -> Tensor:
    """Return which examples have a group. Raises DataError."""
    if not predicted.shape == labels.shape == groups.shape or labels.ndim != 1:
        raise DataError(
            f"predictions {list(predicted.shape)}, labels {list(labels.shape)} and groups {list(groups.shape)} "
            "must all be [examples]"
        )
    for what, values, most in (
        ("label", labels, classes),
        ("prediction", predicted, classes),
        ("group", groups, count),
    ):
        if len(values) and (int(values.max()) >= most or (what != "group" and int(values.min()) < 0)):
            raise DataError(f"{what}s must be below {most}, got {int(values.min())} to {int(values.max())}")
    known = groups >= 0
    if not bool(known.any()):
        raise DataError("no example has a known group: look at the group column, or at how unknown groups are treated")
    return known


def _gap(rates: Rates) -> Tensor:
    """Return for each class the largest less the least rate of a group; 0 where fewer than two are defined."""
    high = rates.nan_to_num(nan=-torch.inf).amax(1)
    low = rates.nan_to_num(nan=torch.inf).amin(1)
    return torch.where(rates.isnan().logical_not().sum(1) >= 2, high - low, 0.0)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
