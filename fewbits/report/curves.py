"""Training curves: every numeric series of ``metrics.jsonl`` over the step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from fewbits.report import text
from fewbits.report.charts import LineChart, line_chart

NOT_SERIES = ("step", "epoch", "stage")  # these say where a line belongs

Panels = dict[str, dict[str, dict[float, float]]]


def curves(lines: list[dict[str, Any]]) -> list[LineChart]:
    """Return one chart a metric, with a series a stage and a split; loss first, learning rates last.

    A step that was logged twice (a run resumed behind its last log) shows its later value. A line without a
    step belongs to the step logged before it.
    """
    panels: Panels = {}
    step = 0.0
    for line in lines:
        step = _number(line.get("step"), otherwise=step)
        for group, name, value in _values(line):
            label = _series(group, str(line.get("stage") or ""))
            panels.setdefault(name, {}).setdefault(label, {})[step] = value
    labels = dict.fromkeys(label for panel in panels.values() for label in panel)
    colours = {label: number for number, label in enumerate(labels)}
    steps = sorted({step for panel in panels.values() for points in panel.values() for step in points})
    charts = []
    for name in sorted(panels, key=_order):
        series = {label: sorted(points.items()) for label, points in panels[name].items()}
        charts.append(line_chart(text.metric(name).label, series, colours, steps))
    return charts


def _values(line: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, str, float]]:
    """Yield ``(group, name, value)``; ``{"eval": {"top1": 1}}`` and ``"eval/top1"`` mean the same."""
    for key, value in line.items():
        if isinstance(value, Mapping):
            yield from _values(value, f"{group}/{key}" if group else key)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key not in NOT_SERIES:
            *outer, name = key.split("/")
            yield "/".join([group] * bool(group) + outer), name, _number(value, otherwise=math.nan)


def _series(group: str, stage: str) -> str:
    if not group or not stage or group == stage:
        return group or stage or "run"
    return group if stage == "train" else f"{stage} {group}"


def _number(value: object, otherwise: float) -> float:
    # beyond 1e300 the differences that an axis needs overflow
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else otherwise


def _order(name: str) -> tuple[int, str]:
    known = ["loss", *text.METRICS]
    place = known.index(name) if name in known else len(known)
    return (len(known) + 1 if name.startswith("lr") else place, name)
