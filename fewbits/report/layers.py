"""What is shown of each layer: the bit map, the errors, and what was not quantized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fewbits.report import text
from fewbits.report.schema import Layer, NotQuantized

FEW = 10  # up to so many columns have room for horizontal names
LABELLED = 32  # up to so many columns have room for a value of two digits
ROOMY = 20  # up to so many columns have room for any value
NAMED = 60  # up to so many columns have room for vertical names


@dataclass(frozen=True)
class Bar:
    """One layer's column: height in percent, colour class, value as text, and what the pointer is told."""

    height: float
    colour: str
    value: str
    tip: str


@dataclass(frozen=True)
class Strip:
    """One measure over all layers; ``top`` is the value of a full column."""

    title: str
    top: str
    bars: list[Bar]


@dataclass(frozen=True)
class Skyline:
    """Strips over the same layers, one under the other."""

    names: list[str]
    strips: list[Strip]

    @property
    def few(self) -> bool:
        """Whether names fit horizontally."""
        return len(self.names) <= FEW

    @property
    def named(self) -> bool:
        """Whether names fit at all."""
        return len(self.names) <= NAMED

    def shows(self, value: str) -> bool:
        """Whether there is room for ``value`` above its column."""
        return len(self.names) <= (LABELLED if len(value) <= 2 else ROOMY)


@dataclass(frozen=True)
class Run:
    """Steps, or channels, in a row, from ``start``, that have the same bits."""

    start: float
    length: float
    colour: str
    tip: str


@dataclass(frozen=True)
class History:
    """Bits of each layer over ``steps``, or over its channels: one row of runs a layer."""

    steps: float
    rows: list[tuple[str, list[Run]]]
    legend: list[tuple[str, str]]


def bit_map(layers: list[Layer]) -> Skyline:
    """Return weight bits and activation bits of every layer; a tensor in float is a full, hatched column."""
    widths = [b for layer in layers for b in (layer.weight_bits, layer.input_bits) if b is not None]
    top = max([8.0, *widths])
    strips = []
    for title, values in (
        ("Weight bits", [layer.weight_bits for layer in layers]),
        ("Activation bits", [layer.input_bits for layer in layers]),
    ):
        bars = [
            Bar(
                100.0 if bits is None else 100 * bits / top,
                colour(bits),
                text.bits(bits),
                f"{name}\n{title}: {text.bits(bits)}",
            )
            for name, bits in zip((layer.name for layer in layers), values)
        ]
        strips.append(Strip(title, text.bits(top), bars))
    return Skyline([layer.name for layer in layers], strips)


def errors(layers: list[Layer]) -> Skyline | None:
    """Return weight error and output SQNR of every layer; None where neither was measured."""
    measures = {
        "Relative weight MSE": [layer.weight_error for layer in layers],
        "Output SQNR in dB, higher is better": [layer.sqnr_db for layer in layers],
    }
    strips = [
        _error_strip(title, layers, values)
        for title, values in measures.items()
        if any(value is not None for value in values)
    ]
    return Skyline([layer.name for layer in layers], strips) if strips else None


def channel_map(layers: list[Layer]) -> History | None:
    """Return the widths of the channels of each layer, sorted, as shares of it; None where none differ."""
    mixed = [layer for layer in layers if layer.channel_bits]
    rows, used = [], set()
    for layer in mixed:
        total, start, runs = sum(layer.channel_bits.values()), 0.0, []
        for bits, count in sorted((int(b), n) for b, n in layer.channel_bits.items()):
            tip = f"{layer.name}\n{bits} bits: {count} of {total} channels"
            runs.append(Run(start, 100 * count / total, colour(bits), tip))
            used.add(bits)
            start += 100 * count / total
        rows.append((layer.name, runs))
    return History(100, rows, [(colour(b), f"{b} bit") for b in sorted(used)]) if rows else None


def colour(bits: float | None) -> str:
    """Return the class that colours a bit width: ``b1`` .. ``b8``, ``b16``, or ``bf`` for float."""
    if bits is None or not math.isfinite(bits):
        return "bf"
    return "b16" if bits > 8 else f"b{max(1, round(bits))}"


@dataclass(frozen=True)
class Left:
    """Layers that stay in float for the same reason."""

    kind: str
    reason: str
    names: list[str]


def left_in_float(layers: list[NotQuantized]) -> list[Left]:
    """Gather the layers that share kind and reason, in the order of the model."""
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        groups.setdefault((layer.kind, layer.reason), []).append(layer.name)
    return [Left(kind, reason or "no reason given", names) for (kind, reason), names in groups.items()]


def _error_strip(title: str, layers: list[Layer], values: Sequence[float | None]) -> Strip:
    finite = [v for v in values if v is not None and math.isfinite(v)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    bars = []
    for layer, value in zip(layers, values, strict=True):
        tip = f"{layer.name}\n{title}: {text.number(value)}\nweight bits: {text.bits(layer.weight_bits)}"
        bars.append(Bar(_height(value, low, high), colour(layer.weight_bits), text.short(value), tip))
    return Strip(title, text.short(high), bars)


def _height(value: float | None, low: float, high: float) -> float:
    if value is None or math.isnan(value):
        return 0.0
    # an exact layer has an infinite SQNR: a full column
    return 100 * (min(max(value, low), high) - low) / ((high - low) or 1)
