"""Putting the page together and writing it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fewbits.errors import DataError
from fewbits.report import charts, classes, curves, fusion, groups, layers, load, search, sizes, summary, text
from fewbits.report.schema import Result


def write_report(run_folder: Path, beside: Sequence[Path] = ()) -> Path:
    """Write ``report.html`` from the ``result.json`` and ``metrics.jsonl`` of a run folder; return its path.

    beside: folders of other runs, whose groups are shown beside this one's. The page is one file without references to
    others. Parts that the result does not have are left out and named. Raises DataError for a missing or malformed
    file, for runs whose groups are not the same, and where the folder cannot be written.
    """
    folder = Path(run_folder)
    result = load.read_result(folder / "result.json")
    others = {Path(other).name: load.read_result(Path(other) / "result.json") for other in beside}
    page = render(groups.put_beside(result, others), load.read_log(folder / "metrics.jsonl"))
    path, draft = folder / "report.html", folder / "report.html.draft"
    try:
        draft.write_text(page, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise DataError(f"cannot write {path}: {error}; make the folder writable and try again") from error
    return path


def render(result: Result, log: load.Log) -> str:
    """Return the page as HTML. Every string of the result is escaped by the template."""
    environment = _environment()
    style, script = (Markup(environment.get_template(n).render()) for n in ("style.css.j2", "script.js.j2"))
    # a browser runs the script with this hash and no other, whatever strings the result holds
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.get_template("report.html.j2")
    return template.render(style=style, script=script, script_hash=digest, **_content(result, log))


def _content(result: Result, log: load.Log) -> dict[str, Any]:
    plan = result.plan
    drawn = curves.curves(log.lines)
    histograms = [charts.histogram_chart(name, h) for name, h in (result.histograms or {}).items()]
    return {
        "result": result,
        "headline": summary.headline(result),
        "findings": summary.findings(result),
        "missing": summary.missing(result, logged=bool(drawn)),
        "summary": summary.summary(result),
        "bit_map": layers.bit_map(result.layers) if result.layers else None,
        "channel_map": layers.channel_map(result.layers),
        "bits_used": _bits_used(result),
        "search_way": search.way(result.search) if result.search else None,
        "search_layers": search.sigma_and_kl(result.search) if result.search else [],
        "search_history": search.history(result.search) if result.search else None,
        "hardware": search.hardware(result.hardware, result.layers),
        "group_chart": groups.chart(result.groups) if result.groups else None,
        "group_plots": groups.plots(result.groups) if result.groups else [],
        "group_metric": groups.metric(result.groups) if result.groups else "",
        "group_rows": groups.rows(result.groups) if result.groups else [],
        "fusion_forms": fusion.forms(result.fusion, result.headline) if result.fusion else [],
        "fusion_nodes": fusion.rows(result.fusion) if result.fusion else [],
        "size_parts": sizes.size_parts(result),
        "size_files": sizes.size_files(result),
        "curves": drawn,
        "log_cut": log.cut,
        "dot_plots": classes.dot_plots(result),
        "class_chart": classes.class_chart(result),
        "matrices": classes.matrices(result),
        "most_cells": classes.MOST_CELLS,
        "classes_counted": max((len(form.confusion) for _, form in result.forms), default=0),
        "errors": layers.errors(result.layers),
        "histograms": histograms,
        "coarsest": min(range(len(histograms)), key=lambda i: histograms[i].levels, default=0),
        "not_quantized": layers.left_in_float(plan.not_quantized if plan else []),
        "decided_from": text.pairs((plan.decided_from or {}) if plan else {}),
        "budget": text.pairs(result.budget or {}),
        "environment": text.pairs(result.environment or {}),
        "times": sizes.times(result),
    }


def _bits_used(result: Result) -> list[tuple[str, str]]:
    """Return colour class and text of the bit widths in use: the legend of the bit map."""
    used = {b for layer in result.layers for b in (layer.weight_bits, layer.input_bits)}
    ordered = sorted(used, key=lambda b: 99.0 if b is None else b)
    return [(layers.colour(b), "float" if b is None else f"{text.bits(b)} bit") for b in ordered]


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=text.number, size=text.size, count=text.count, bits=text.bits, bit_colour=layers.colour
    )
    return environment
