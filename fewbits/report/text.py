"""Numbers as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NONE = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
GROUPS = ("base", "novel", "frequent", "common", "rare")  # of the classes of an open-vocabulary detector


@dataclass(frozen=True)
class Metric:
    """How a metric is written. ``higher_is_better`` is None where the report cannot know."""

    label: str
    unit: str = ""
    higher_is_better: bool | None = None


METRICS = {
    "top1": Metric("top-1", "%", True),
    "top5": Metric("top-5", "%", True),
    "accuracy": Metric("accuracy", "%", True),
    "loss": Metric("loss", "", False),
    "perplexity": Metric("perplexity", "", False),
    "bits_per_byte": Metric("bits a byte", "", False),
    "miou": Metric("mIoU", "%", True),
    "dice": Metric("Dice", "%", True),
    "dice_images": Metric("Dice of an image", "%", True),
    "boundary_f1": Metric("boundary F1", "%", True),
    "pixel_accuracy": Metric("pixel accuracy", "%", True),
    "map": Metric("mAP", "%", True),
    "map50": Metric("mAP50", "%", True),
    "map75": Metric("mAP75", "%", True),
    "map_small": Metric("mAP of small", "%", True),
    "map_medium": Metric("mAP of medium", "%", True),
    "map_large": Metric("mAP of large", "%", True),
    **{f"map_{group}": Metric(f"mAP of {group} classes", "%", True) for group in GROUPS},
    "token_accuracy": Metric("next-token accuracy", "%", True),
}


def metric(name: str) -> Metric:
    """Return how a metric is written; one that is not known keeps its own name."""
    return METRICS.get(name, Metric(name))


def number(value: float | None, digits: int = 3) -> str:
    """Write with ``digits`` significant digits: ``0.0421``, ``1.2e-07``, or a dash for None."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{MINUS if value < 0 else ''}∞"
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}".replace("-", MINUS)
    if abs(value) >= 10**digits:
        return f"{value:,.0f}".replace("-", MINUS) if abs(value) < 1e9 else f"{value:.{digits}g}"
    return f"{value:.{digits}g}".replace("-", MINUS)


def short(value: float | None) -> str:
    """Write with two digits in as little room as a chart has: ``0.036``, ``12``, ``2e-5``."""
    if value is None or not 0 < abs(value) < 1e-3:
        return number(value, 2)
    digits, power = f"{value:.0e}".split("e")
    return f"{digits}e{int(power)}".replace("-", MINUS)


def percent(value: float | None) -> str:
    """Write a value that is already in percent: ``98.30 %``, ``100 %``."""
    if value is None or not math.isfinite(value):
        return number(value)
    if value in (0, 100):
        return f"{value:.0f} %"
    text = f"{value:.2f}"
    # rounding must not turn "nearly all" into "all"
    return "> 99.99 %" if text == "100.00" and value < 100 else f"{text} %".replace("-", MINUS)


def measure(name: str, value: float | None) -> str:
    """Write the value of a metric with its unit."""
    return percent(value) if metric(name).unit == "%" else number(value)


def size(value: float | None) -> str:
    """Write bytes in decimal units: ``412 B``, ``20.3 kB``, ``2.21 MB``."""
    if value is None or not math.isfinite(value):
        return number(value)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} GB" if value < 1000 else f"{value:,.0f} GB"


def count(value: float | None) -> str:
    """Write a large count shortly: ``864``, ``36.9k``, ``11.7M``."""
    if value is None or not math.isfinite(value) or value < 1000:
        return number(value)
    for unit in ("k", "M", "G"):
        value /= 1000
        if value < 999.5:
            return f"{value:.3g}{unit}"
    return f"{value / 1000:.3g}T"


def ratio(value: float) -> str:
    """Write a factor: ``4.2×``, ``10.9×``, ``118×``."""
    return f"{value:.{2 if value < 2 else 1 if value < 100 else 0}f}{TIMES}"


def bits(value: float | None) -> str:
    """Write a bit width; None is float."""
    return "float" if value is None else f"{value:.3g}"


def duration(value: float | None) -> str:
    """Write seconds: ``0.41 s``, ``48.2 s``, ``3 min 12 s``, ``2 h 05 min``."""
    if value is None or not math.isfinite(value) or value < 60:
        return f"{number(value)} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def pairs(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested data to ``("outer.inner", text)``."""
    found: list[tuple[str, str]] = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            found += pairs(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", plain(value)))
    return found


def plain(value: Any) -> str:
    """Write any value of a JSON file for a person."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return number(value, 6)
    if isinstance(value, list):
        return ", ".join(map(plain, value)) or "none"
    return str(value)
