"""The geometry: everything drawn lies inside the plot, and thinning keeps the extremes."""

from __future__ import annotations

import math
import re

from hypothesis import given
from hypothesis import strategies as st

from fewbits.report.charts import domain, histogram_chart, line_chart, noisy, thin, ticks, windows
from fewbits.report.schema import Histogram

finite = st.floats(min_value=-1e300, max_value=1e300)
numbers = re.compile(r"-?\d+(?:\.\d+)?")


@given(st.lists(finite, min_size=1), st.sampled_from([0, 0.06]))
def test_ticks_lie_on_the_axis_that_holds_the_values(values: list[float], pad: float) -> None:
    low, high = domain(values, pad)
    assert low <= min(values) and max(values) <= high and low < high
    marks = ticks(low, high)
    assert 1 <= len(marks) <= 6
    assert all(-1e-6 <= mark.at <= 100 + 1e-6 for mark in marks)


def test_ticks_are_round_numbers() -> None:
    assert [t.label for t in ticks(0, 1.1)] == ["0.0", "0.5", "1.0"]
    assert [t.label for t in ticks(-0.3, 0.3, 6)] == ["−0.3", "−0.2", "−0.1", "0.0", "0.1", "0.2", "0.3"]  # noqa: RUF001
    assert [t.label for t in ticks(0, 4000)] == ["0", "1,000", "2,000", "3,000", "4,000"]


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=60))
def test_lines_stay_inside_the_plot_and_lost_values_are_told(values: list[float]) -> None:
    points = [(float(i), v) for i, v in enumerate(values)]
    chart = line_chart("loss", {"train": points}, {"train": 0}, [x for x, _ in points])
    lost = sum(not math.isfinite(v) for v in values)
    assert (f"{lost} values are not finite" in chart.note) == (lost > 0)
    assert sum(len(line.points) for line in chart.lines) == len(values) - lost
    for line in chart.lines:
        assert all(-1 <= float(n) <= 1001 for n in numbers.findall(line.path))


def test_thinning_keeps_spikes_and_order() -> None:
    points = [(float(i), math.sin(i)) for i in range(20_000)]
    points[777], points[15_000] = (777.0, 50.0), (15_000.0, -50.0)
    kept = thin(points)
    assert len(kept) <= 620
    assert points[777] in kept and points[15_000] in kept
    assert kept == sorted(kept)


def test_a_noisy_line_gets_its_mean() -> None:
    calm = [(float(i), i / 1000) for i in range(1000)]
    wild = [(x, y + (-1) ** int(x)) for x, y in calm]
    assert noisy(wild) and not noisy(calm)
    means, width = windows(wild)
    assert width == 25 and len(means) == 40
    assert abs(means[20][1] - 0.5) < 0.1
    chart = line_chart("loss", {"calm": calm, "wild": wild}, {"calm": 0, "wild": 1}, [0, 999])
    assert [bool(line.trend) for line in chart.lines] == [False, True]
    assert "mean of 25 values of wild" in chart.note


def test_histogram_draws_its_grid_even_outside_the_bins() -> None:
    chart = histogram_chart("fc", Histogram(edges=[0, 1, 2], counts=[1, 3], grid=[-2, 0, 4, 4]))
    assert chart.levels == 3 and chart.total == 4
    assert chart.lines.count("M") == 3
    assert "V0.0" in chart.area  # the fullest bin reaches the top
    places = [float(n) for n in re.findall(r"M([\d.]+)", chart.lines)]
    assert 0 < places[0] < places[1] < places[2] < 1000
    assert histogram_chart("fc", Histogram(edges=[0, 0], counts=[0], grid=[])).levels == 0
