from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewbits.errors import DataError
from fewbits.report import write_report
from fewbits.report.groups import chart, rows
from fewbits.report.layers import channel_map
from fewbits.report.load import Log
from fewbits.report.page import render
from fewbits.report.schema import Groups, Layer, Result

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


def test_other_runs_stand_beside_this_one(tmp_path: Path) -> None:
    uniform = {**GIVEN, "quantized": {"acc_groups": {"light": 89.0, "dark": 41.5}, "acc_worst": 41.5}}
    for name, groups in (("fair", GIVEN), ("uniform", uniform), ("other", {"quantized": {"acc_groups": {"a": 1.0}}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({"groups": groups}))
    page = write_report(tmp_path / "fair", [tmp_path / "uniform"]).read_text()
    assert "41.50 %" in page and "this run" in page and '<th scope="col">uniform</th>' in page
    assert "this run" not in write_report(tmp_path / "fair").read_text()
    with pytest.raises(DataError, match=r"run 'other' has the groups \['a'\]"):
        write_report(tmp_path / "fair", [tmp_path / "other"])
    (tmp_path / "other/result.json").write_text("{}")
    with pytest.raises(DataError, match="run 'other' does not tell of groups"):
        write_report(tmp_path / "fair", [tmp_path / "other"])
    with pytest.raises(DataError, match="this run tells of no groups"):
        write_report(tmp_path / "other", [tmp_path / "fair"])


def test_widths_of_channels_are_drawn_as_shares_of_a_layer() -> None:
    mixed = Layer(name="conv", channel_bits={"4": 1, "2": 3})
    drawn = channel_map([Layer(name="plain", weight_bits=4), mixed])
    assert drawn is not None and [name for name, _ in drawn.rows] == ["conv"]
    assert [(run.start, run.length, run.colour) for run in drawn.rows[0][1]] == [(0, 75, "b2"), (75, 25, "b4")]
    assert drawn.legend == [("b2", "2 bit"), ("b4", "4 bit")] and channel_map([Layer(name="plain")]) is None
