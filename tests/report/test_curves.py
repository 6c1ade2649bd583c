"""Every numeric series of the log finds its chart."""

from __future__ import annotations

from typing import Any

from fewbits.report.charts import LineChart
from fewbits.report.curves import curves


def drawn(lines: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    charts: list[LineChart] = curves(lines)
    return {chart.title: {line.name: line.points for line in chart.lines} for chart in charts}


def test_both_spellings_of_an_evaluation_are_one_series() -> None:
    found = drawn(
        [
            {"step": 0, "stage": "train", "loss": 2.0, "lr": 0.1, "epoch": 0},
            {"step": 1, "stage": "train", "eval": {"loss": 1.5, "top1": 60.0, "confusion": [[1]]}},
            {"step": 2, "eval/loss": 1.0, "eval/top1": 70, "done": True},
        ]
    )
    assert found == {
        "loss": {"train": [(0, 2.0)], "eval": [(1, 1.5), (2, 1.0)]},
        "top-1": {"eval": [(1, 60.0), (2, 70.0)]},
        "lr": {"train": [(0, 0.1)]},
    }
    assert list(found) == ["loss", "top-1", "lr"]


def test_stages_are_series_of_their_own() -> None:
    found = drawn([{"step": 0, "stage": "float", "loss": 1}, {"step": 0, "stage": "float", "eval": {"loss": 2}}])
    assert found == {"loss": {"float": [(0, 1)], "float eval": [(0, 2)]}}


def test_a_resumed_run_shows_the_later_value_of_a_step_in_order() -> None:
    lines = [{"step": s, "loss": v} for s, v in [(1, 5), (2, 4), (3, 9), (2, 3), (3, 2)]]
    assert drawn(lines) == {"loss": {"run": [(1, 5), (2, 3), (3, 2)]}}


def test_a_line_without_step_belongs_to_the_step_before() -> None:
    assert drawn([{"step": 7, "loss": 1}, {"step": None, "eval": {"top1": 5}}])["top-1"] == {"eval": [(7, 5)]}


def test_values_beyond_drawing_are_counted() -> None:
    chart = curves([{"step": 0, "loss": float("nan")}, {"step": 1, "loss": 10**400}, {"step": 2, "loss": 1}])[0]
    assert chart.note.startswith("2 values are not finite")
    assert curves([]) == []
