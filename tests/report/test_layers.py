"""Bars, parts and classes: heights and shares follow the numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fewbits.report.classes import class_chart, dot_plots, matrices
from fewbits.report.layers import bit_map, colour, errors, left_in_float
from fewbits.report.schema import Layer, NotQuantized, Result
from fewbits.report.sizes import size_files, size_parts, times


def layer(**given: Any) -> Layer:
    return Layer.model_validate({"name": "fc", **given})


def test_bit_map_heights_and_colours() -> None:
    weights, inputs = bit_map([layer(weight_bits=2, input_bits=4), layer(weight_bits=8)]).strips
    assert [(bar.height, bar.colour) for bar in weights.bars] == [(25, "b2"), (100, "b8")]
    assert [(bar.height, bar.colour, bar.value) for bar in inputs.bars] == [(50, "b4", "4"), (100, "bf", "float")]
    assert bit_map([layer(weight_bits=4, input_bits=16)]).strips[0].bars[0].height == 25


@pytest.mark.parametrize(("bits", "name"), [(1, "b1"), (0.5, "b1"), (2.4, "b2"), (16, "b16"), (None, "bf")])
def test_colours(bits: float | None, name: str) -> None:
    assert colour(bits) == name


def test_errors_show_exact_and_missing_values() -> None:
    assert errors([layer(weight_bits=4)]) is None
    sky = errors([layer(sqnr_db=math.inf), layer(sqnr_db=20), layer(), layer(sqnr_db=-5), layer(sqnr_db=math.nan)])
    assert sky is not None and len(sky.strips) == 1
    assert [bar.height for bar in sky.strips[0].bars] == [100, 100, 0, 0, 0]
    assert sky.strips[0].bars[0].value == "∞"


def test_layers_left_in_float_are_gathered_by_reason() -> None:
    given = [("bn1", "BatchNorm2d", "folded"), ("pool", "MaxPool2d", ""), ("bn2", "BatchNorm2d", "folded")]
    groups = left_in_float([NotQuantized(name=n, kind=k, reason=r) for n, k, r in given])
    assert [(g.kind, g.names) for g in groups] == [("BatchNorm2d", ["bn1", "bn2"]), ("MaxPool2d", ["pool"])]
    assert groups[1].reason == "no reason given"


def test_shares_of_size_and_time() -> None:
    result = Result.model_validate(
        {
            "size": {"codes": 75, "scales": 25, "padding": 0, "unknown": None},
            "seconds": {"total": 200.0, "train": 150.0},
            "float": {"size_bytes": 1000},
            "packed": {"file_bytes": 100},
        }
    )
    assert [(p.name, p.percent) for p in size_parts(result)] == [
        ("Codes", 75), ("Scales and offsets", 25), ("padding", 0),
    ]  # fmt: skip
    assert [(p.name, p.percent) for p in size_files(result)] == [("float", 100), ("packed", 10)]
    assert [(p.text, p.percent) for p in times(result)] == [("3 min 20 s", 100), ("2 min 30 s", 75)]


def confused(before: list[list[int]], after: list[list[int]], **more: Any) -> Result:
    forms = {"float": {"metrics": {"confusion": before}}, "quantized": {"metrics": {"confusion": after}}}
    return Result.model_validate({**forms, **more})


def test_recall_of_each_class() -> None:
    result = confused([[9, 1], [0, 10]], [[8, 2], [0, 10]], classes=["cat", 7])
    chart = class_chart(result)
    assert chart is not None
    assert [(c.name, c.text) for c in chart.changes] == [("cat", "−10.0"), ("7", "same")]  # noqa: RUF001
    assert chart.low == "78 %" and chart.changes[1].after == 100
    first, second = matrices(result)
    assert (first.title, second.title) == ("Float", "Quantized")
    assert {(c.y, c.x, c.count) for c in second.cells} == {(0, 0, "8"), (0, 1, "2"), (1, 1, "10")}
    assert second.labels == ["cat", "7"]


def test_many_classes_show_those_that_lost_most_and_no_matrix() -> None:
    right = [[10 * (i == j) for j in range(130)] for i in range(130)]
    worse = [row[:] for row in right]
    worse[99][99], worse[99][0] = 4, 6
    chart = class_chart(confused(right, worse))
    assert chart is not None and chart.changes[0].name == "99" and len(chart.changes) == 24
    assert "24 of 130" in chart.note
    assert matrices(confused(right, worse)) == []


def test_classes_without_samples_have_no_recall() -> None:
    assert class_chart(confused([[0]], [[0]])) is None
    assert class_chart(confused([[1]], [[1, 0], [0, 1]])) is None


def test_dots_lie_on_their_axis() -> None:
    forms = {"float": {"metrics": {"top1": 99.9, "loss": 0.0}}, "quantized": {"metrics": {"top1": 98.0}}}
    plots = dot_plots(Result.model_validate(forms))
    assert [plot.title for plot in plots] == ["top-1"]
    assert plots[0].high == "100 %"
    assert all(0 < dot.at < 100 for dot in plots[0].dots)
