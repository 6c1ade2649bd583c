"""The tables of ``benchmarks.fairquant``: arms by mean bits, mean and standard deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

Rows = list[dict[str, Any]]


def table(rows: Rows, references: Mapping[str, str]) -> str:
    """Return tables for each data set and model. references: of each arm, in their order, the one it is held to."""
    parts = []
    for data, model in dict.fromkeys((row["data"], row["model"]) for row in rows):
        own = [row for row in rows if (row["data"], row["model"]) == (data, model)]
        seeds = {row["seed"]: row["float"] for row in own}
        told = " / ".join(spread([f[name] for f in seeds.values()]) for name in ("acc", "acc_worst"))
        odds = spread([f["eodd_sum"] for f in seeds.values()], 3)
        parts.append(f"### {data}, {model}\n\nFloat ({len(seeds)} seeds): {told}, equalised odds {odds}.\n")
        parts += [f"{title}\n\n{grid(own, references, cell)}\n" for title, cell in CELLS.items()]
    return "\n".join(parts)


def grid(rows: Rows, references: Mapping[str, str], cell: Callable[[Rows, Rows], str]) -> str:
    """Return a table of arms by bits. cell: of the rows of an arm and those of its reference at the same bits."""
    widths = sorted({row["bits"] for row in rows})
    lines = ["| arm | " + " | ".join(f"{b:g}" for b in widths) + " |", "| --- " * (len(widths) + 1) + "|"]
    found = {(a, b): [r for r in rows if (r["arm"], r["bits"]) == (a, b)] for a in references for b in widths}
    for arm, reference in references.items():
        cells = [cell(found[arm, b], found[reference, b]) if found[arm, b] else "" for b in widths]
        if any(cells):
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def scores(own: Rows, _: Rows) -> str:
    """Return accuracy / worst group."""
    return " / ".join(spread([row["metrics"][name] for row in own], 1) for name in ("acc", "acc_worst"))


def lost(own: Rows, _: Rows) -> str:
    """Return the most that a group lost against float, and equalised odds."""
    most = spread([-min(change["change"] for change in row["changes"].values()) for row in own], 1)
    return f"{most}; {spread([row['metrics']['eodd_sum'] for row in own], 3)}"


def beside(own: Rows, reference: Rows) -> str:
    """Return worst group and accuracy less those of the reference with the same seed."""
    other = {row["seed"]: row["metrics"] for row in reference}
    pairs = [(row["metrics"], other[row["seed"]]) for row in own if row["seed"] in other]
    if not pairs or own is reference:
        return ""
    return " / ".join(spread([a[name] - b[name] for a, b in pairs], 1, "+") for name in ("acc_worst", "acc"))


def stored(own: Rows, _: Rows) -> str:
    """Return mean bits of weights and of channels, and kilobytes."""
    means = [statistics.mean(row[name] for row in own) for name in ("average_bits", "channel_bits", "bytes")]
    return f"{means[0]:.2f}; {means[1]:.2f}; {means[2] / 1000:,.0f}"


CELLS = {
    "Accuracy / worst group, by mean bits of a weight:": scores,
    "The most that a group lost against float, in points; equalised odds (sum):": lost,
    "Worst group / accuracy, less those of uniform_qat (trained arms) or uniform_ptq with the same seed:": beside,
    "Bits of a weight; of a channel; kB stored:": stored,
}


def spread(values: list[float], digits: int = 1, sign: str = "") -> str:
    """Write mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{deviation}"
