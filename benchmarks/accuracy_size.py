"""Accuracy against size of several arms: the table, and the picture with the front that no other arm beats."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.figure import Panel, Point, figure
from fewbits.report.search import front

Row = dict[str, Any]
Cell = tuple[str, float]  # arm, budget in percent of INT8
HEAD = ("| budget | arm | size | top-1, mean ± sd | seeds | over uniform | time |", "| --- " * 7 + "|")


def table(rows: Sequence[Row], models: Iterable[str]) -> str:
    """Return mean and spread of the test accuracy by model, budget and arm, in Markdown.

    "over uniform": points above the uniform model of the same seed at equal size, on the straight lines between its
    widths. Time: of the plan or search, as a multiple of the training of a planned run.
    """
    parts = []
    for model in models:
        own = [row for row in rows if row["model"] == model]
        cells = _cells(own)
        qat = _mean([r["seconds_train"] for r in own if r.get("spent") == 0 and "same_as" not in r])
        lines = [f"{model}: {_floats(own)}", "", *HEAD]
        for (arm, percent), found in sorted(cells.items(), key=lambda item: (item[0][1], item[0][0])):
            lines.append(_line(arm, percent, found, uniform_lines(own), qat))
        lines += ["", *_notes(own)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def uniform_lines(rows: Iterable[Row]) -> dict[int, list[tuple[float, float]]]:
    """Return the (bits, accuracy) of the uniform runs, ascending, by seed."""
    found: dict[int, set[tuple[float, float]]] = defaultdict(set)
    for row in rows:
        if row["arm"] == "uniform" and row.get("top1") is not None:
            found[row["seed"]].add((row["average_bits"], row["top1"]))
    return {seed: sorted(points) for seed, points in found.items()}


def interpolate(line: Sequence[tuple[float, float]], x: float) -> float | None:
    """Return the height of a line at ``x``; None outside it."""
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    return None


def chart(rows: Sequence[Row], models: Iterable[str]) -> str:
    """Return an SVG with a panel a model: mean accuracy over size for each arm, and the front of all."""
    arms = sorted({row["arm"] for row in rows if row.get("bits")}, key=lambda arm: (arm != "uniform", arm))
    panels = []
    for model in models:
        means: dict[str, set[Point]] = {arm: set() for arm in arms}
        for (arm, _), found in _cells([row for row in rows if row["model"] == model]).items():
            means[arm].add((_mean([r["average_bits"] for r in found]) / 0.08, _mean([r["top1"] for r in found])))
        best = front([point for found in means.values() for point in found])
        title = f"{model}, top-1 in % over size in % of INT8"
        panels.append(Panel(title, {arm: sorted(found) for arm, found in means.items()}, dashed=best))
    return figure(panels, note="dashed: front of all")


def _cells(rows: Iterable[Row]) -> dict[Cell, list[Row]]:
    cells: dict[Cell, list[Row]] = defaultdict(list)
    for row in rows:
        if row.get("top1") is not None and row["arm"] != "float":
            cells[row["arm"], row["percent"]].append(row)
    return dict(cells)


def _line(arm: str, percent: float, found: list[Row], lines: dict[int, list[tuple[float, float]]], qat: float) -> str:
    top1 = [row["top1"] for row in found]
    spread = f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else "one seed"
    gaps = []
    for row in found:
        level = interpolate(lines.get(row["seed"], []), row["average_bits"])
        gaps += [] if level is None else [row["top1"] - level]
    over = f"{_mean(gaps):+.2f}" if gaps and arm != "uniform" else ""
    # what a search trains counts into the same total as a planned run's training
    time = f"{_mean([r.get('seconds_plan', 0.0) for r in found]) / qat:.2f}x" if qat else ""
    size = _mean([r["average_bits"] for r in found]) / 0.08
    above = sum(r["average_bits"] > 0.08 * percent * (1 + 1e-9) for r in found)
    missed = f" (above it in {above} of {len(found)})" if above else ""
    return (
        f"| {percent:g} % | {arm} | {size:.1f} %{missed} | {_mean(top1):.2f} ± {spread} | "
        f"{', '.join(f'{t:.2f}' for t in top1)} | {over} | {time} |"
    )


def _floats(rows: Iterable[Row]) -> str:
    found = [row["top1"] for row in rows if row["arm"] == "float"]
    return f"float {_mean(found):.2f} % ({', '.join(f'{t:.2f}' for t in found)})" if found else "no float run"


def _notes(rows: Iterable[Row]) -> list[str]:
    """Return what arms said that found nothing."""
    return sorted({f"* {r['arm']} at {r['percent']:g} %: {r['note']}" for r in rows if r.get("note")})


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values) if values else 0.0
