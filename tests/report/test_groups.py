from __future__ import annotations

from fewbits.report.groups import chart, rows
from fewbits.report.load import Log
from fewbits.report.page import render
from fewbits.report.schema import Groups, Result

GIVEN = {
    "float": {"acc_groups": {"light": 90.0, "dark": 80.0}, "acc_worst": 80.0, "eodd_sum": 0.25},
    "quantized": {"acc_groups": {"light": 88.0, "dark": 60.0}, "acc_worst": 60.0, "eodd_sum": 0.5},
    "verdict": "group 'dark' loses most, 20.0 points (15.0 to 25.0)",
}


def test_each_group_has_its_change_and_each_measure_a_row() -> None:
    groups = Groups.model_validate(GIVEN)
    drawn = chart(groups)
    assert drawn is not None and drawn.low == "58 %"
    light, dark = drawn.changes
    assert (light.name, dark.name) == ("light", "dark")
    assert abs(dark.before - 100 * 22 / 42) < 1e-9 and abs(dark.after - 100 * 2 / 42) < 1e-9 and "20" in dark.text
    assert rows(groups) == [["worst group", "80.00 %", "60.00 %"], ["equalized odds, summed", "0.25", "0.5"]]
    assert chart(Groups()) is None


def test_the_page_tells_who_lost_most() -> None:
    page = render(Result.model_validate({"groups": GIVEN}), Log([]))
    assert "Group &#39;dark&#39; loses most, 20.0 points (15.0 to 25.0)." in page and "worst group" in page
    assert 'id="groups"' not in render(Result(), Log([]))
