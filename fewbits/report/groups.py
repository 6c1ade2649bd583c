"""How each group is served, float and quantized, and what quantization took from whom."""

from __future__ import annotations

import math

from fewbits.report.classes import ClassChart, change_of
from fewbits.report.schema import Groups
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


def rows(groups: Groups) -> list[list[str]]:
    """Return one row a measure: its name, float, quantized."""
    found = []
    for key, (label, in_percent) in GAPS.items():
        values = [getattr(form, key) for form in (groups.float_form, groups.quantized)]
        if any(value is not None for value in values):
            found.append([label, *(percent(value) if in_percent else number(value) for value in values)])
    return found
