"""The report of a run: ``result.json`` and ``metrics.jsonl`` in, one self-contained ``report.html`` out."""

from fewbits.report.page import write_report

__all__ = ["write_report"]
