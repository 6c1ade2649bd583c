"""Geometry of the charts, in thousandths of the plot area, so that a page can stretch them to any width.

The drawings are inline SVG and HTML made here, not a plotting library's: they weigh kilobytes instead of
the five megabytes of an inlined library, follow the page's colours in the dark, and need no script.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fewbits.report.schema import Histogram
from fewbits.report.text import MINUS

SPAN = 1000
FEW_POINTS = 40  # up to so many are marked one by one
MAX_POINTS = 600  # of a drawn line: more do not show, and only weigh

Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: position in percent and text."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One series: name, the points that the pointer reads, SVG path, marks on the points if few, colour.

    A noisy series also has a ``trend``: the path of its windowed means.
    """

    name: str
    points: list[Point]
    path: str
    marks: str
    trend: str
    colour: int


@dataclass(frozen=True)
class LineChart:
    """A chart of lines over one x axis. ``note`` tells what could not be drawn."""

    title: str
    domain: tuple[float, float]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    note: str

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script reads values from, as plain data."""
        return {
            "domain": self.domain,
            "lines": [{"name": line.name, "points": line.points} for line in self.lines],
        }


@dataclass(frozen=True)
class HistogramChart:
    """Weights of one layer as a stepped area, and its grid of ``levels`` values as vertical lines."""

    name: str
    area: str
    lines: str
    levels: int
    x_ticks: list[Tick]
    total: float


def ticks(low: float, high: float, wanted: int = 4) -> list[Tick]:
    """Return round numbers between ``low`` and ``high``, about ``wanted`` of them."""
    step = _step((high - low) / wanted)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [i * step for i in range(first, last + 1)]
    return [Tick(100 * share(v, low, high), _label(v, step)) for v in values]


def share(value: float, low: float, high: float) -> float:
    """Return where ``value`` lies between ``low`` (0) and ``high`` (1)."""
    return (value - low) / (high - low)


def domain(values: Sequence[float], pad: float = 0) -> tuple[float, float]:
    """Return an axis that holds the values, with a margin of ``pad`` of their span; never of no length."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    largest = max(abs(low), abs(high))
    if high - low <= 1e-9 * max(largest, 1e-290):
        room = largest / 2 if largest > 1e-290 else 0.5
        return low - room, high + room
    margin = pad * (high - low)
    # a loss that comes near zero is read against zero
    floor = 0.0 if pad and 0 <= low < 0.3 * high else low - margin
    return floor, high + margin


def line_chart(
    title: str, series: dict[str, list[Point]], colours: dict[str, int], steps: Sequence[float]
) -> LineChart:
    """Draw series of ``(step, value)``, steps ascending, each in its numbered colour, over the span of ``steps``.

    Values that are not finite are counted, not drawn.
    """
    finite = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    lost = sum(map(len, series.values())) - sum(map(len, finite.values()))
    drawn = {name: points for name, points in finite.items() if points}
    (x0, x1), (y0, y1) = domain(steps), domain([y for line in drawn.values() for _, y in line], pad=0.06)

    def places(points: list[Point]) -> list[str]:
        return [f"{SPAN * share(x, x0, x1):.1f} {SPAN * (1 - share(y, y0, y1)):.1f}" for x, y in points]

    lines, notes = [], [f"{lost} values are not finite and are not drawn."] if lost else []
    for name, points in drawn.items():
        path = "M" + "L".join(places(thin(points)))
        if noisy(points):
            means, width = windows(points)
            trend = "M" + "L".join(places(means))
            lines.append(Line(f"{name}, mean", means, path, "", trend, colours[name]))
            notes.append(f"Bold is the mean of {width} values of {name}, faint what was logged.")
        else:
            marks = "".join(f"M{p}h0" for p in places(points)) if len(points) <= FEW_POINTS else ""
            lines.append(Line(name, thin(points), path, marks, "", colours[name]))
    return LineChart(title, (x0, x1), ticks(x0, x1), ticks(y0, y1), lines, " ".join(notes))


def noisy(points: list[Point]) -> bool:
    """Tell whether a long series goes up and down many times its range, so that its course is hard to see."""
    values = [y for _, y in points]
    travelled = sum(abs(b - a) for a, b in itertools.pairwise(values))
    return len(values) >= 4 * FEW_POINTS and travelled > 5 * (max(values) - min(values))


def windows(points: list[Point], wanted: int = FEW_POINTS) -> tuple[list[Point], int]:
    """Return the means of about ``wanted`` windows, and how many points a window has."""
    width = math.ceil(len(points) / wanted)
    parts = [points[i : i + width] for i in range(0, len(points), width)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts], width


def thin(points: list[Point], most: int = MAX_POINTS) -> list[Point]:
    """Keep the lowest and the highest point of each stretch, so that spikes survive the thinning."""
    if len(points) <= most:
        return points
    width = math.ceil(2 * len(points) / most)
    kept: list[Point] = []
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def histogram_chart(name: str, histogram: Histogram) -> HistogramChart:
    """Draw the bins as one area and the grid over them, on an axis wide enough for both."""
    edges, counts, grid = histogram.edges, histogram.counts, histogram.grid
    low, high = domain([*edges, *grid], pad=0.03)
    top = max(*counts, 1)
    xs = [SPAN * share(e, low, high) for e in edges]
    steps = [f"H{xs[i]:.1f}V{SPAN * (1 - c / top):.1f}" for i, c in enumerate(counts)]
    area = f"M{xs[0]:.1f} {SPAN}{''.join(steps)}H{xs[-1]:.1f}V{SPAN}Z"
    levels = sorted(set(grid))
    # many levels would paint over the area: they become a rug under it
    start = 0 if len(levels) <= FEW_POINTS else 920
    lines = "".join(f"M{SPAN * share(level, low, high):.1f} {start}V{SPAN}" for level in levels)
    return HistogramChart(name, area, lines, len(levels), ticks(low, high, 6), sum(counts))


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def _label(value: float, step: float) -> str:
    value = 0.0 if abs(value) < step / 2 else value
    if abs(value) >= 1e5 or 0 < step < 1e-4:
        return f"{value:.3g}".replace("-", MINUS)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}".replace("-", MINUS)
