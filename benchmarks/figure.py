"""Lines of several arms as an SVG for ``docs/results``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fewbits.report.charts import domain, share, ticks

Point = tuple[float, float]
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 560, 340, 56, 34, 44, 170
COLOURS = ("#8a929b", "#2f5fd0", "#d9661f", "#1f8f66", "#8a4fc0", "#b3261e", "#b0860b", "#108a9c", "#6c8f1c", "#b03a48",
           "#3f4fc4", "#7a5c3e", "#c060a0", "#4a6b6b", "#1b1f24", "#9fc131", "#ff9f1c", "#5bc0eb")  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """lines: points by arm, in the order of the colours, which all panels of a figure share. dashed: one more line.

    labels: of the whole numbers on the x axis, where they stand for something else.
    """

    title: str
    lines: dict[str, list[Point]]
    dashed: Sequence[Point] = ()
    labels: Sequence[str] = ()


def figure(panels: Sequence[Panel], note: str = "") -> str:
    """Return an SVG of panels side by side, with one legend and a note under it."""
    total, arms = len(panels) * WIDTH, list(panels[0].lines) if panels else []
    drawn = "".join(f'<g transform="translate({i * WIDTH} 0)">{_draw(panel)}</g>' for i, panel in enumerate(panels))
    legend = "".join(
        f'<circle cx="{total + 12}" cy="{TOP + 20 * i}" r="5" fill="{COLOURS[i % len(COLOURS)]}"/>'
        f'<text x="{total + 24}" y="{TOP + 4 + 20 * i}">{escape(arm)}</text>'
        for i, arm in enumerate(arms)
    )
    legend += f'<text x="{total + 6}" y="{TOP + 14 + 20 * len(arms)}">{escape(note)}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total + LEGEND} {HEIGHT}" font-family="sans-serif" '
        'font-size="13" fill="#5f6770"><rect width="100%" height="100%" fill="#fbfbf9"/>'
        f"{drawn}{legend}</svg>\n"
    )


def _draw(panel: Panel) -> str:
    points = [point for line in panel.lines.values() for point in line]
    title = f'<text x="{LEFT}" y="{TOP - 14}" font-weight="bold" fill="#1b1f24">{escape(panel.title)}'
    if not points:
        return f"{title}: no finished run</text>"
    (x0, x1), (y0, y1) = domain([x for x, _ in points], pad=0.05), domain([y for _, y in points], pad=0.05)
    if panel.labels:
        x0, x1 = -0.2, len(panel.labels) - 0.8
    wide, high = WIDTH - LEFT - 24, HEIGHT - TOP - BOTTOM

    def at(point: Point) -> str:
        return f"{LEFT + wide * share(point[0], x0, x1):.1f},{TOP + high * (1 - share(point[1], y0, y1)):.1f}"

    parts = [f"{title}</text>"]
    for tick in ticks(y0, y1, 5):
        y = TOP + high * (1 - tick.at / 100)
        parts.append(f'<path d="M{LEFT} {y:.1f}h{wide}" stroke="#dfe1dc"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick.label}</text>')
    marks = [(100 * share(i, x0, x1), label) for i, label in enumerate(panel.labels)]
    for place, label in marks or [(tick.at, tick.label) for tick in ticks(x0, x1, 6)]:
        x = LEFT + wide * place / 100
        parts.append(f'<text x="{x:.1f}" y="{TOP + high + 18}" text-anchor="middle">{label}</text>')
    if panel.dashed:
        line = " ".join(map(at, panel.dashed))
        parts.append(f'<polyline points="{line}" fill="none" stroke="#1b1f24" stroke-dasharray="5 4"/>')
    for i, (arm, line) in enumerate(panel.lines.items()):
        colour, path = COLOURS[i % len(COLOURS)], " ".join(map(at, line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for point in line:
            x, y = at(point).split(",")
            told = f"<title>{escape(arm)}: {point[1]:.4g} at {point[0]:.4g}</title>"
            parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}">{told}</circle>')
    return "".join(parts)
