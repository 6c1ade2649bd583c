"""Accuracy against size of several arms: the table, and the picture with the front that no other arm beats."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from fewbits.report.charts import domain, share, ticks
from fewbits.report.search import front

Row = dict[str, Any]
Cell = tuple[str, float]  # arm, budget in percent of INT8
HEAD = ("| budget | arm | size | top-1, mean ± sd | seeds | over uniform | time |", "| --- " * 7 + "|")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 560, 340, 56, 34, 44, 170
COLOURS = ("#8a929b", "#2f5fd0", "#d9661f", "#1f8f66", "#8a4fc0", "#b3261e", "#b0860b", "#108a9c", "#6c8f1c", "#b03a48",
           "#3f4fc4")  # fmt: skip


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
    names, panels = list(models), []
    arms = sorted({row["arm"] for row in rows if row.get("bits")}, key=lambda arm: (arm != "uniform", arm))
    for i, model in enumerate(names):
        panels.append(f'<g transform="translate({i * WIDTH} 0)">{_panel(rows, model, arms)}</g>')
    total = len(names) * WIDTH
    legend = "".join(
        f'<circle cx="{total + 12}" cy="{TOP + 20 * i}" r="5" fill="{COLOURS[i % len(COLOURS)]}"/>'
        f'<text x="{total + 24}" y="{TOP + 4 + 20 * i}">{escape(arm)}</text>'
        for i, arm in enumerate(arms)
    )
    legend += f'<text x="{total + 6}" y="{TOP + 14 + 20 * len(arms)}">dashed: front of all</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total + LEGEND} {HEIGHT}" font-family="sans-serif" '
        'font-size="13" fill="#5f6770"><rect width="100%" height="100%" fill="#fbfbf9"/>'
        f"{''.join(panels)}{legend}</svg>\n"
    )


def _panel(rows: Sequence[Row], model: str, arms: Sequence[str]) -> str:
    means: dict[str, set[tuple[float, float]]] = defaultdict(set)
    for (arm, _), found in _cells([row for row in rows if row["model"] == model]).items():
        means[arm].add((_mean([r["average_bits"] for r in found]) / 0.08, _mean([r["top1"] for r in found])))
    points = [point for found in means.values() for point in found]
    if not points:
        return f'<text x="{LEFT}" y="{TOP}">{escape(model)}: no finished run</text>'
    (x0, x1), (y0, y1) = domain([x for x, _ in points], pad=0.05), domain([y for _, y in points], pad=0.05)
    wide, high = WIDTH - LEFT - 24, HEIGHT - TOP - BOTTOM

    def at(point: tuple[float, float]) -> str:
        return f"{LEFT + wide * share(point[0], x0, x1):.1f},{TOP + high * (1 - share(point[1], y0, y1)):.1f}"

    parts = [f'<text x="{LEFT}" y="{TOP - 14}" font-weight="bold" fill="#1b1f24">{escape(model)}, top-1 in % over size '
             "in % of INT8</text>"]  # fmt: skip
    for tick in ticks(y0, y1, 5):
        y = TOP + high * (1 - tick.at / 100)
        parts.append(f'<path d="M{LEFT} {y:.1f}h{wide}" stroke="#dfe1dc"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick.label}</text>')
    for tick in ticks(x0, x1, 6):
        x = LEFT + wide * tick.at / 100
        parts.append(f'<text x="{x:.1f}" y="{TOP + high + 18}" text-anchor="middle">{tick.label}</text>')
    best = " ".join(map(at, front(points)))
    parts.append(f'<polyline points="{best}" fill="none" stroke="#1b1f24" stroke-dasharray="5 4"/>')
    for i, arm in enumerate(arms):
        colour, line = COLOURS[i % len(COLOURS)], sorted(means.get(arm, ()))
        parts.append(f'<polyline points="{" ".join(map(at, line))}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for point in line:
            x, y = at(point).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"><title>{escape(arm)}: {point[1]:.2f} % at '
                         f"{point[0]:.1f} %</title></circle>")  # fmt: skip
    return "".join(parts)


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
