"""Numbers as a person reads them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fewbits.report import text


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (text.number(None), "–"),  # noqa: RUF001
        (text.number(0.04213), "0.0421"),
        (text.number(-3), "−3"),  # noqa: RUF001
        (text.number(1234567), "1,234,567"),
        (text.number(1234.5), "1,234"),
        (text.number(math.nan), "not a number"),
        (text.number(-math.inf), "−∞"),  # noqa: RUF001
        (text.number(1e300), "1e+300"),
        (text.short(0.0000238), "2e−5"),  # noqa: RUF001
        (text.short(0.0357), "0.036"),
        (text.percent(98.3), "98.30 %"),
        (text.percent(100), "100 %"),
        (text.percent(99.999), "> 99.99 %"),
        (text.percent(None), "–"),  # noqa: RUF001
        (text.size(412), "412 B"),
        (text.size(999.9), "1 kB"),
        (text.size(87_512), "87.5 kB"),
        (text.size(4.2e10), "42 GB"),
        (text.count(864), "864"),
        (text.count(36_864), "36.9k"),
        (text.count(11_689_512), "11.7M"),
        (text.ratio(1.234), "1.23×"),  # noqa: RUF001
        (text.ratio(118.2), "118×"),  # noqa: RUF001
        (text.duration(0.414), "0.414 s"),
        (text.duration(192), "3 min 12 s"),
        (text.duration(7500), "2 h 05 min"),
        (text.bits(2.0), "2"),
        (text.bits(None), "float"),
    ],
)
def test_written(written: str, expected: str) -> None:
    assert written == expected


def test_nested_data_is_flattened() -> None:
    data: dict[str, Any] = {"a": {"b": 1, "c": {"d": [1, "x"]}}, "e": True, "f": None, "g": []}
    assert text.pairs(data) == [("a.b", "1"), ("a.c.d", "1, x"), ("e", "yes"), ("f", text.NONE), ("g", "none")]
