"""Accuracy before and after: of the whole, of each class, and as confusion matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewbits.report import text
from fewbits.report.charts import share
from fewbits.report.schema import Result

MOST_CLASSES = 24  # of the per-class chart; beyond it the classes that lost most are shown
MOST_CELLS = 120  # classes of a drawn confusion matrix
WRITTEN = 12  # classes up to which cells carry their count


@dataclass(frozen=True)
class Dot:
    """One form's value on an axis: its name, its place in percent, and its text."""

    name: str
    at: float
    text: str
    colour: str


@dataclass(frozen=True)
class DotPlot:
    """One metric of every form, on an axis that spans only what was measured."""

    title: str
    dots: list[Dot]
    low: str
    high: str


@dataclass(frozen=True)
class ClassChange:
    """Recall of one class before and after: places on the chart's axis in percent, and the change as text."""

    name: str
    before: float
    after: float
    text: str
    tip: str


@dataclass(frozen=True)
class ClassChart:
    """Recall of the classes on an axis from ``low`` to 100 %. ``note``: which classes were left out."""

    changes: list[ClassChange]
    low: str
    note: str


@dataclass(frozen=True)
class Cell:
    """One filled cell: column (predicted), row (true), strength 0..1, count as text, and pointer's text."""

    x: int
    y: int
    strength: float
    count: str
    tip: str


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix, rows true and columns predicted. ``labels`` are empty where they would not fit."""

    title: str
    classes: int
    cells: list[Cell]
    labels: list[str]
    written: bool

    @property
    def margin(self) -> float:
        """Room for the labels, in cells."""
        return 0.5 + 0.3 * max(map(len, self.labels), default=0)


def dot_plots(result: Result) -> list[DotPlot]:
    """Return one plot a metric that at least two forms have."""
    names = list(dict.fromkeys(name for _, form in result.forms for name in form.scalars))
    plots = []
    for name in names:
        values = {who: form.scalars[name] for who, form in result.forms if name in form.scalars}
        values = {who: value for who, value in values.items() if math.isfinite(value)}
        if len(values) > 1:
            plots.append(dot_plot(name, values))
    return plots


def dot_plot(name: str, values: dict[str, float], title: str | None = None) -> DotPlot:
    """Return one metric of several forms, on an axis that spans what they have."""
    low, high = min(values.values()), max(values.values())
    # differences under a point are noise on small test sets: do not blow them up to the full width
    room = max(0.15 * (high - low), 0.5 if text.metric(name).unit == "%" else 0.05 * abs(high) or 1.0)
    low, high = low - room, high + room
    if text.metric(name).unit == "%":
        high = min(high, 100.0)
    dots = [
        Dot(who, 100 * share(value, low, high), text.measure(name, value), "p0" if who == "float" else "p1")
        for who, value in values.items()
    ]
    return DotPlot(title or text.metric(name).label, dots, text.measure(name, low), text.measure(name, high))


def class_chart(result: Result) -> ClassChart | None:
    """Compare the recall of each class in float and quantized; of many classes only those that lost most."""
    if not result.reference or not result.quantized:
        return None
    before, after = _recall(result.reference.confusion), _recall(result.quantized.confusion)
    if len(before) != len(after):
        return None
    both = [(i, b, a) for i, (b, a) in enumerate(zip(before, after)) if b is not None and a is not None]
    if not both:
        return None
    shown, note = both, ""
    if len(both) > MOST_CLASSES:
        shown = sorted(both, key=lambda item: item[2] - item[1])[:MOST_CLASSES]
        note = f"The {MOST_CLASSES} of {len(both)} classes that lost most."
    low = max(0, math.floor(min(min(b, a) for _, b, a in shown)) - 2)
    changes = [change_of(result.class_name(i), b, a, low) for i, b, a in shown]
    return ClassChart(changes, f"{low:.0f} %", note)


def matrices(result: Result) -> list[Matrix]:
    """Return the confusion matrices of the float and of the quantized model, as far as they can be drawn."""
    forms = [("Float", result.reference), ("Quantized", result.quantized)]
    return [
        _matrix(title, form.confusion, result)
        for title, form in forms
        if form and 0 < len(form.confusion) <= MOST_CELLS
    ]


def _recall(rows: list[list[float]]) -> list[float | None]:
    return [100 * row[i] / sum(row) if sum(row) else None for i, row in enumerate(rows)]


def change_of(name: str, before: float, after: float, low: float) -> ClassChange:
    gap = round(after - before, 2)
    words = f"{gap:+.1f}".replace("-", text.MINUS) if gap else "same"
    tip = f"{name}\nfloat {text.percent(before)}\nquantized {text.percent(after)}"
    return ClassChange(name, 100 * share(before, low, 100), 100 * share(after, low, 100), words, tip)


def _matrix(title: str, rows: list[list[float]], result: Result) -> Matrix:
    names = [result.class_name(i) for i in range(len(rows))]
    cells = [
        _cell(x, y, n, sum(row), f"true {names[y]}\npredicted {names[x]}")
        for y, row in enumerate(rows)
        for x, n in enumerate(row)
        if n
    ]
    labels = names if len(rows) <= MOST_CLASSES else []
    return Matrix(title, len(rows), cells, labels, written=len(rows) <= WRITTEN)


def _cell(x: int, y: int, count: float, of: float, what: str) -> Cell:
    tip = f"{what}\n{text.number(count)} of {text.number(of)}"
    # the root makes the few errors visible beside the many right answers
    written = text.count(count) if count >= 10_000 else text.number(count)  # a cell has room for five characters
    return Cell(x, y, (count / of) ** (1 / 3), written, tip)
