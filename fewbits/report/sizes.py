"""Where the bytes and the seconds went."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewbits.report import text
from fewbits.report.schema import Result

PARTS = {
    "codes": ("Codes", "p1"),
    "scales": ("Scales and offsets", "p2"),
    "float": ("Left in float", "p3"),
    "header": ("Header", "p4"),
}


@dataclass(frozen=True)
class Share:
    """One part of a whole: its name, its text, its percent, and its colour class."""

    name: str
    text: str
    percent: float
    colour: str


def size_parts(result: Result) -> list[Share]:
    """Split the packed file into its parts; a part whose name is not known is shown under its own name."""
    sizes = _usable(result.size)
    whole = sum(sizes.values()) or 1.0
    shares = []
    for key, value in sizes.items():
        name, colour = PARTS.get(key, (key, "p5"))
        shares.append(Share(name, text.size(value), 100 * value / whole, colour))
    return shares


def size_files(result: Result) -> list[Share]:
    """Return the size of each stored form of the model, to one scale."""
    forms = [(name, form.bytes) for name, form in result.forms if name != "quantized"]
    sizes = {name: size for name, size in forms if size}
    largest = max(sizes.values(), default=1.0)
    return [
        Share(name, text.size(size), 100 * size / largest, "p0" if name == "float" else "p1")
        for name, size in sizes.items()
    ]


def times(result: Result) -> list[Share]:
    """Return where the time went, in percent of the total."""
    seconds = _usable(result.seconds)
    total = seconds.get("total") or sum(seconds.values()) or 1.0
    return [
        Share(name.replace("_", " "), text.duration(value), min(100.0, 100 * value / total), "p1")
        for name, value in seconds.items()
    ]


def _usable(values: dict[str, float | None] | None) -> dict[str, float]:
    given = (values or {}).items()
    return {key: value for key, value in given if value is not None and 0 <= value < math.inf}
