"""The verdict in plain words, the summary table, and the comparison of accuracy before and after."""

from __future__ import annotations

from dataclasses import dataclass

from fewbits.report import text
from fewbits.report.schema import Measured, Result

AGREEMENT_GOAL = 99.9  # percent of samples on which a runtime should give the packed model's answer

NOUNS = {
    "classification": "images",
    "language": "tokens",
    "segmentation": "pixels",
    "detection": "detections",
    "open_vocabulary": "detections",
}  # what an answer is about


@dataclass(frozen=True)
class Finding:
    """One line under the headline. ``mark``: ``good``, ``warn``, ``bad``, or ``note``."""

    mark: str
    text: str


def main_metric(result: Result) -> str | None:
    """Return the metric that the headline speaks of: top-1 where there is one, rather not the loss."""
    names = list(dict.fromkeys(name for _, form in result.forms for name in form.scalars))
    first = [n for n in ("top1", "accuracy") if n in names] + [n for n in names if n != "loss"] + names
    return first[0] if first else None


def headline(result: Result) -> str:
    """Say in one sentence how much smaller, and at what cost."""
    parts = [p for p in (_smaller(result), _accuracy(result)) if p]
    if parts:
        return ", ".join(parts) + "."
    if result.quantized and result.quantized.avg_weight_bits is not None:
        return f"Quantized to {text.bits(result.quantized.avg_weight_bits)} bits a weight on average."
    return "This result holds no comparison with a float model."


def findings(result: Result) -> list[Finding]:
    """Return the lines under the headline: bits, packed file, runtime, speed."""
    found = [_bits(result), _packed(result), _agreement(result), _speed(result)]
    return [finding for finding in found if finding]


def missing(result: Result, logged: bool) -> list[str]:
    """Name what the run folder does not hold, so that an absent section is not mistaken for a good one."""
    layers = result.layers
    there = {
        "the float model": result.reference,
        "the quantized model": result.quantized,
        "the packed file": result.packed,
        "ONNX Runtime": result.onnx,
        "the size of the packed file's parts": result.size,
        "the layers of the plan": layers,
        "errors per layer": any(layer.weight_error is not None or layer.sqnr_db is not None for layer in layers),
        "training curves": logged,
        "weight histograms": result.histograms,
        "confusion matrices": result.task in ("language", "detection", "open_vocabulary")
        or any(form.confusion for _, form in result.forms),
        "the budget": result.budget,
        "times": result.seconds,
        "the environment": result.environment,
    }
    return [name for name, part in there.items() if not part]


def samples(form: Measured | None) -> int:
    """Return on how many samples a form was measured, as its confusion matrix counts them; 0 is unknown."""
    return round(sum(map(sum, form.confusion))) if form else 0


def _after(result: Result) -> Measured | None:
    return result.packed if result.packed and result.packed.metrics else result.quantized


def _smaller(result: Result) -> str:
    before = result.reference.bytes if result.reference else None
    small = [f.bytes for f in (result.packed, result.quantized) if f and f.bytes]
    if not before or not small:
        return ""
    factor = before / small[0]
    return f"{text.ratio(factor)} smaller" if factor >= 1 else f"{text.ratio(1 / factor)} larger"


def _accuracy(result: Result) -> str:
    name, after = main_metric(result), _after(result)
    if name is None or not result.reference or not after:
        return ""
    before, now = result.reference.scalars.get(name), after.scalars.get(name)
    if before is None or now is None:
        return ""
    label, gap = text.metric(name).label, now - before
    amount = f"{abs(gap):.2f}" if text.metric(name).unit == "%" else text.number(abs(gap))
    if float(amount.replace(",", "")) == 0:
        return f"the same {label} as float"
    points = " points" if text.metric(name).unit == "%" else ""
    return f"{amount}{points} {'higher' if gap > 0 else 'lower'} {label} than float"


def _bits(result: Result) -> Finding | None:
    average = result.quantized.avg_weight_bits if result.quantized else None
    if average is None:
        return None
    sizes = [text.size(f.bytes) for f in (result.reference, result.packed) if f and f.bytes]
    stored = f": {' of float become '.join(sizes)} on disk" if len(sizes) == 2 else ""
    return Finding("note", f"{text.bits(average)} bits a weight on average{stored}")


def _packed(result: Result) -> Finding | None:
    wrong = result.packed.code_mismatches if result.packed else None
    if wrong is None:
        return None
    if wrong == 0:
        return Finding("good", "The packed file equals the trained model: 0 code mismatches")
    return Finding("bad", f"The packed file differs from the trained model: {wrong:,} code mismatches")


def _agreement(result: Result) -> Finding | None:
    form = result.onnx
    if form is None or form.top1_agreement is None:
        return None
    total, noun = samples(form), NOUNS.get(result.task or "", "samples")
    where = f"{total:,} {noun}" if total else f"the {noun} tried"
    gap = "" if form.max_abs_diff is None else f", largest output difference {text.number(form.max_abs_diff)}"
    mark = "good" if form.top1_agreement >= AGREEMENT_GOAL else "warn"
    return Finding(mark, f"ONNX Runtime agrees on {text.percent(form.top1_agreement)} of {where}{gap}")


def _speed(result: Result) -> Finding | None:
    form = result.onnx
    if form is None or not form.latency_ms or not form.float_latency_ms:
        return None
    factor = form.float_latency_ms / form.latency_ms
    times = f"{text.number(form.latency_ms)} ms against {text.number(form.float_latency_ms)} ms"
    if factor >= 1:
        return Finding("good", f"{text.ratio(factor)} faster than float in ONNX Runtime: {times}")
    return Finding("warn", f"Slower than float in ONNX Runtime: {text.ratio(1 / factor)} the time, {times}")


@dataclass(frozen=True)
class Table:
    """Column titles and rows of text; the first column names the row."""

    columns: list[str]
    rows: list[list[str]]


def summary(result: Result) -> Table:
    """Compare the forms of the model; columns that no form fills are left out."""
    forms = result.forms
    names = list(dict.fromkeys(name for _, form in forms for name in form.scalars))
    before = result.reference.bytes if result.reference else None
    onnx_before = result.onnx.float_latency_ms if result.onnx else None
    columns: dict[str, list[str]] = {}
    for name in names:
        columns[text.metric(name).label] = [text.measure(name, form.scalars.get(name)) for _, form in forms]
    columns["bits a weight"] = [text.number(form.avg_weight_bits) for _, form in forms]
    columns["weights"] = [text.size(form.weight_bytes) for _, form in forms]
    columns["size"] = [text.size(form.bytes) for _, form in forms]
    columns["smaller"] = [
        _factor(before, form.bytes) if form is not result.reference else text.NONE for _, form in forms
    ]
    columns["latency"] = [_latency(onnx_before if form is result.reference else form.latency_ms) for _, form in forms]
    kept = {title: cells for title, cells in columns.items() if set(cells) != {text.NONE}}
    rows = [[name, *(cells[i] for cells in kept.values())] for i, (name, _) in enumerate(forms)]
    return Table(["model", *kept], rows)


def _factor(before: float | None, after: float | None) -> str:
    return text.ratio(before / after) if before and after else text.NONE


def _latency(milliseconds: float | None) -> str:
    return text.NONE if milliseconds is None else f"{text.number(milliseconds)} ms"
