"""The search of bit widths: what it knew of the layers, the way it took, and what the hardware makes of its plan."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fewbits.report import text
from fewbits.report.charts import SPAN, Point, Tick, domain, share, ticks
from fewbits.report.layers import Bar, History, Run, Skyline, Strip, colour
from fewbits.report.schema import Hardware, Layer, Search, SearchStep

LIMITS = {"size_bytes": "size", "average_bits": "bits a weight", "bops": "bit operations", "energy_uj": "energy, µJ",
          "latency_ms": "latency, ms"}  # fmt: skip
REGIONS = {"target": "s2", "bit-decrease": "s0", "bit-increase": "s3", "transition": "s1", "beyond": "s4"}
MEASURES = {"cycles": "Cycles of a product, mean", "compute_energy_uj": "Compute energy in µJ",
            "memory_energy_uj": "Memory energy in µJ", "latency_ms": "Latency in ms"}  # fmt: skip


@dataclass(frozen=True)
class Spot:
    """A point: place in percent from the left and from below, colour class, and what the pointer is told."""

    x: float
    y: float
    colour: str
    tip: str


@dataclass(frozen=True)
class Zone:
    """A rectangle of the plane, in thousandths from the upper left corner."""

    name: str
    colour: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Scatter:
    """Points in a plane. legend: colour class and text; zones lie under, lines (path, colour class) between."""

    title: str
    x_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    spots: list[Spot]
    legend: list[tuple[str, str]]
    zones: list[Zone]
    lines: list[tuple[str, str]]


def sigma_and_kl(search: Search) -> list[Scatter]:
    """Return one plane a width: each layer's divergence over its sigma, in the colour of its cluster."""
    widths = sorted({w for layer in search.layers for w in layer.kl}, key=lambda w: (len(w), w))
    clusters = sorted({layer.cluster for layer in search.layers if layer.cluster is not None})
    legend = [(f"s{clusters.index(c) % 6}", f"cluster {c}") for c in clusters]
    charts = []
    for width in widths:
        known = [(layer, layer.sigma, layer.kl.get(width)) for layer in search.layers]
        points = [(layer, s, kl) for layer, s, kl in known if s is not None and kl is not None and _finite(s + kl)]
        if not points:
            continue
        (x0, x1), (y0, y1) = domain([s for _, s, _ in points], pad=0.06), domain([k for *_, k in points], pad=0.06)
        spots = [
            Spot(
                100 * share(sigma, x0, x1),
                100 * share(kl, y0, y1),
                "p0" if layer.cluster is None else f"s{clusters.index(layer.cluster) % 6}",
                f"{layer.name}\nsigma {text.number(sigma)}\nKL at {width} bits {text.number(kl)}",
            )
            for layer, sigma, kl in points
        ]
        title = f"KL divergence at {width} bits"
        charts.append(Scatter(title, "sigma of the weights", ticks(x0, x1), ticks(y0, y1), spots, legend, [], []))
    return charts


def way(search: Search) -> Scatter | None:
    """Return the steps in the plane of the leading cost and accuracy; None where no step has both.

    Zones are the regions that the targets and buffers make; the second line joins the steps that no other beats.
    """
    limit = _leading(search)
    steps = [(s, s.costs.get(limit), s.accuracy) for s in search.log]
    drawn = [(s, float(x), float(y)) for s, x, y in steps if x is not None and y is not None and _finite(x + y)]
    if not drawn:
        return None
    start = (search.reference.costs.get(limit), search.reference.accuracy)
    first = [(float(x), float(y)) for x, y in [start] if x is not None and y is not None and _finite(x + y)]
    points = [(x, y) for _, x, y in drawn]
    borders = _borders(search, limit)
    (x0, x1) = domain([*(x for x, _ in (*points, *first)), *borders[0]], pad=0.06)
    (y0, y1) = domain([*(y for _, y in (*points, *first)), *borders[1]], pad=0.06)

    def spot(x: float, y: float, colour: str, tip: str) -> Spot:
        return Spot(100 * share(x, x0, x1), 100 * share(y, y0, y1), colour, tip)

    def path(line: Iterable[Point]) -> str:
        places = (f"{SPAN * share(x, x0, x1):.1f} {SPAN * (1 - share(y, y0, y1)):.1f}" for x, y in line)
        return "M" + "L".join(places)

    phases = list(dict.fromkeys(str(s.phase) for s, _, _ in drawn))
    spots = [spot(x, y, "p0", f"reference\n{_measured(limit, x, y)}") for x, y in first]
    spots += [spot(x, y, f"s{phases.index(str(s.phase)) % 6}", _tip(s, limit, x, y)) for s, x, y in drawn]
    zones = _zones(borders, (x0, x1), (y0, y1))
    legend = [("p0", "reference")] if first else []
    legend += [(f"s{i % 6}", f"phase {phase}") for i, phase in enumerate(phases)]
    legend += [(zone.colour, f"region {zone.name}") for zone in zones]
    lines = [(path(points), "p0"), (path(front(points)), "s2")]
    return Scatter("Accuracy", LIMITS.get(limit, limit), ticks(x0, x1), ticks(y0, y1), spots, legend, zones, lines)


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points (cost, accuracy) that no other beats in both, by ascending cost."""
    best: list[Point] = []
    for x, y in sorted(set(points), key=lambda p: (p[0], -p[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


def history(search: Search) -> History | None:
    """Return the bits of each layer over the steps; None where fewer than two steps have bits."""
    steps = [s for s in search.log if s.bits]
    if len(steps) < 2:
        return None
    rows, used = [], set()
    for name in steps[0].bits:
        runs, start = [], 0
        for bits, group in itertools.groupby(s.bits.get(name) for s in steps):
            length = len(list(group))
            span = f"step {steps[start].step}" + (f" to {steps[start + length - 1].step}" if length > 1 else "")
            runs.append(Run(start, length, colour(bits), f"{name}\n{text.bits(bits)} bits\n{span}"))
            used.add(bits)
            start += length
        rows.append((name, runs))
    ordered = sorted(used, key=lambda b: 99.0 if b is None else b)
    return History(len(steps), rows, [(colour(b), f"{text.bits(b)} bit") for b in ordered])


def hardware(given: Hardware | None, layers: list[Layer]) -> Skyline | None:
    """Return cycles, energies and latency of every layer, in the colours of its weight bits; None without any."""
    if given is None:
        return None
    bits = {layer.name: layer.weight_bits for layer in layers}
    strips = []
    for key, title in MEASURES.items():
        values = [getattr(layer, key) for layer in given.layers]
        finite = [value for value in values if _finite(value)]
        if not finite:
            continue
        top = max(finite)
        bars = [
            Bar(
                100 * max(value, 0.0) / top if _finite(value) and top > 0 else 0.0,
                colour(bits.get(layer.name)),
                text.short(value),
                f"{layer.name}\n{title}: {text.number(value)}\nweight bits: {text.bits(bits.get(layer.name))}",
            )
            for layer, value in zip(given.layers, values)
        ]
        strips.append(Strip(title, text.short(top), bars))
    return Skyline([layer.name for layer in given.layers], strips) if strips else None


def _leading(search: Search) -> str:
    """Return the limit of the x axis: the first target, else the first cost of a step."""
    names = [*search.targets, *(name for step in search.log for name in step.costs)]
    return next((name for name in names if name != "accuracy"), "")


Borders = tuple[list[float], list[float]]  # cost: target, target and buffer; accuracy: target, target less buffer


def _borders(search: Search, limit: str) -> Borders:
    found: Borders = ([], [])
    for values, key, sign in ((found[0], limit, 1), (found[1], "accuracy", -1)):
        target, buffer = search.targets.get(key), search.buffers.get(key)
        if target is not None and _finite(target):
            values += [target, target + sign * (buffer if buffer is not None and _finite(buffer) else 0.0)]
    return found


def _zones(borders: Borders, xs: Point, ys: Point) -> list[Zone]:
    """Cut the plane at the targets; a target that is not given lies at the far side."""
    (x0, x1), (y0, y1) = xs, ys
    cost, near_cost = borders[0] or (x1, x1)
    accuracy, near_accuracy = borders[1] or (y0, y0)
    cuts = {
        "target": (x0, cost, accuracy, y1),
        "bit-decrease": (cost, x1, accuracy, y1),
        "bit-increase": (x0, cost, y0, accuracy),
        "transition": (cost, x1, y0, accuracy),
        "beyond": (near_cost, x1, y0, near_accuracy),  # lies over the one before
    }
    zones = []
    for name, (left, right, low, high) in cuts.items():
        x, y = SPAN * share(left, x0, x1), SPAN * (1 - share(high, y0, y1))
        width, height = SPAN * share(right, x0, x1) - x, SPAN * (1 - share(low, y0, y1)) - y
        if (borders[0] or borders[1]) and width > 0 and height > 0:
            zones.append(Zone(name, REGIONS[name], x, y, width, height))
    return zones


def _tip(step: SearchStep, limit: str, x: float, y: float) -> str:
    moved = f"\nmoved {', '.join(step.moved)}" if step.moved else ""
    return f"step {step.step}, phase {step.phase}\n{_measured(limit, x, y)}\n{step.region or step.status}{moved}"


def _measured(limit: str, x: float, y: float) -> str:
    cost = text.size(x) if limit == "size_bytes" else text.number(x, 4)
    return f"accuracy {text.number(y, 4)}\n{LIMITS.get(limit, limit)} {cost}"


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
