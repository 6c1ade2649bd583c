"""How each group is served, float and quantized, and what quantization took from whom."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fewbits.errors import DataError
from fewbits.report import text
from fewbits.report.classes import ClassChart, DotPlot, change_of, dot_plot
from fewbits.report.schema import Groups, Result
from fewbits.report.text import number, percent

GAPS = {  # of ``group_metrics``: label, and whether it is in percent
    "acc_worst": ("worst group", True),
    "acc_group_mean": ("mean of groups", True),
    "acc_gap": ("best less worst group", True),
    "eopp1": ("equal opportunity, positives", False),
    "eopp0": ("equal opportunity, negatives", False),
    "eodd_sum": ("equalized odds, summed", False),
    "eodd_max": ("equalized odds, larger one", False),
}


def chart(groups: Groups) -> ClassChart | None:
    """Return the accuracy of each group before and after."""
    before, after = groups.float_form.acc_groups, groups.quantized.acc_groups
    names = [name for name in before if name in after]
    if not names:
        return None
    low = max(0, math.floor(min(min(before[n], after[n]) for n in names)) - 2)
    return ClassChart([change_of(name, before[name], after[name], low) for name in names], f"{low:.0f} %", "")


def plots(groups: Groups) -> list[DotPlot]:
    """Return one plot a group, of all forms, where there are other runs to show beside this one."""
    if not groups.beside:
        return []
    forms = {"float": groups.float_form, **groups.beside, "this run": groups.quantized}
    found = []
    for name in groups.quantized.acc_groups:
        values = {who: form.acc_groups[name] for who, form in forms.items() if name in form.acc_groups}
        found.append(dot_plot(groups.metric or "top1", values, title=name))
    return found


def metric(groups: Groups) -> str:
    """Return what the accuracies of groups are called."""
    return "Accuracy" if groups.metric is None else text.metric(groups.metric).label


def put_beside(result: Result, others: Mapping[str, Result]) -> Result:
    """Return the result with the quantized models of other runs beside its own. Raises DataError, naming the run."""
    if not others:
        return result
    if result.groups is None:
        raise DataError("this run tells of no groups, so no other run can stand beside it")
    beside = {}
    for name, other in others.items():
        if other.groups is None or other.groups.metric != result.groups.metric:
            raise DataError(f"run {name!r} does not tell of groups by the same metric, so it cannot stand beside")
        mine, its = (found.groups.quantized.acc_groups for found in (result, other) if found.groups is not None)
        if set(mine) != set(its):
            raise DataError(f"run {name!r} has the groups {sorted(its)}, this one {sorted(mine)}")
        beside[name] = other.groups.quantized
    return result.model_copy(update={"groups": result.groups.model_copy(update={"beside": beside})})


def rows(groups: Groups) -> list[list[str]]:
    """Return one row a measure: its name, float, quantized, and the runs beside."""
    found = []
    for key, (label, in_percent) in GAPS.items():
        values = [getattr(form, key) for form in (groups.float_form, groups.quantized, *groups.beside.values())]
        if any(value is not None for value in values):
            found.append([label, *(percent(value) if in_percent else number(value) for value in values)])
    return found
