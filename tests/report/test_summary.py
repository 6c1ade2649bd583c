"""The verdict says what the numbers say."""

from __future__ import annotations

from typing import Any

import pytest

from fewbits.report.schema import Result
from fewbits.report.summary import findings, headline, summary


def model(**parts: Any) -> Result:
    return Result.model_validate(parts)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ((1000, 98.9), (100, 98.3), "10.0× smaller, 0.60 points lower top-1 than float."),  # noqa: RUF001
        ((1000, 98.0), (500, 98.5), "2.0× smaller, 0.50 points higher top-1 than float."),  # noqa: RUF001
        ((1000, 98.0), (2000, 98.001), "2.0× larger, the same top-1 as float."),  # noqa: RUF001
        ((1000, None), (100, 98.5), "10.0× smaller."),  # noqa: RUF001
        ((None, 50.0), (100, 49.0), "1.00 points lower top-1 than float."),
    ],
)
def test_headline(before: tuple[Any, Any], after: tuple[Any, Any], told: str) -> None:
    def form(size: float | None, top1: float | None) -> dict[str, Any]:
        return {"size_bytes": size, "metrics": {} if top1 is None else {"top1": top1, "loss": 1.0}}

    assert headline(model(float=form(*before), quantized=form(*after))) == told


def test_the_packed_file_speaks_before_the_quantized_model() -> None:
    result = model(
        float={"size_bytes": 900, "metrics": {"perplexity": 10.0}},
        quantized={"size_bytes": 300, "metrics": {"perplexity": 12.0}},
        packed={"file_bytes": 100, "metrics": {"perplexity": 13.5}},
    )
    assert headline(result) == "9.0× smaller, 3.5 higher perplexity than float."  # noqa: RUF001


def marks(result: Result) -> list[tuple[str, str]]:
    return [(finding.mark, finding.text) for finding in findings(result)]


def test_mismatches_and_disagreement_are_told_as_such() -> None:
    onnx = {"top1_agreement": 99.5, "metrics": {"confusion": [[200, 0], [10, 150]]}}
    slow = {"latency_ms": 3.0, "float_latency_ms": 2.0}
    assert marks(model(task="classification", packed={"code_mismatches": 1200}, onnx={**onnx, **slow})) == [
        ("bad", "The packed file differs from the trained model: 1,200 code mismatches"),
        ("warn", "ONNX Runtime agrees on 99.50 % of 360 images"),
        ("warn", "Slower than float in ONNX Runtime: 1.50× the time, 3 ms against 2 ms"),  # noqa: RUF001
    ]


def test_a_good_run_is_told_as_such() -> None:
    onnx = {"top1_agreement": 100, "max_abs_diff": 0.0, "latency_ms": 1, "float_latency_ms": 3}
    assert marks(model(packed={"code_mismatches": 0}, onnx=onnx)) == [
        ("good", "The packed file equals the trained model: 0 code mismatches"),
        ("good", "ONNX Runtime agrees on 100 % of the samples tried, largest output difference 0"),
        ("good", "3.0× faster than float in ONNX Runtime: 1 ms against 3 ms"),  # noqa: RUF001
    ]


def test_nearly_all_is_not_all() -> None:
    assert "> 99.99 %" in marks(model(onnx={"top1_agreement": 99.9999}))[0][1]


def test_summary_leaves_out_empty_columns() -> None:
    table = summary(model(float={"metrics": {"top1": 90.0}}, packed={"file_bytes": 1234, "metrics": {"top1": 89.5}}))
    assert table.columns == ["model", "top-1", "size"]
    assert table.rows == [["float", "90.00 %", "–"], ["packed", "89.50 %", "1.23 kB"]]  # noqa: RUF001
