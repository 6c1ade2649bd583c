"""The log of a run that was killed is still read; a log that was damaged is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewbits.errors import DataError
from fewbits.report import write_report
from fewbits.report.load import read_log


def test_no_log_is_an_empty_log(tmp_path: Path) -> None:
    assert read_log(tmp_path / "metrics.jsonl").lines == []


def test_a_half_written_last_line_is_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n\n{"step": 2, "lo')
    log = read_log(path)
    assert log.lines == [{"step": 1, "loss": 2}]
    assert log.cut
    (tmp_path / "result.json").write_text("{}")
    assert "half written" in write_report(tmp_path).read_text()


@pytest.mark.parametrize("line", ['{"step": 2, "lo', "3", "[]"])
def test_a_malformed_line_is_an_error_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        read_log(path)
