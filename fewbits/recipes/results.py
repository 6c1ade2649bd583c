"""``result.json``, by the schema of the report, and the table that a run ends with."""

from __future__ import annotations

import copy
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.table import Table
from torch import nn

import fewbits
from fewbits.cost import model_shape, size
from fewbits.layers import quantize
from fewbits.plan import Plan
from fewbits.recipes.details import histograms, layer_rows, not_quantized
from fewbits.recipes.fairly import group_entry
from fewbits.recipes.folder import RunFolder, finite, put, put_json
from fewbits.recipes.searching import hardware_entry
from fewbits.recipes.task import Task
from fewbits.report import write_report
from fewbits.report.text import measure, metric

PACKAGES = ("torch", "torchvision", "numpy", "lightning-fabric", "onnx", "onnxruntime", "safetensors")
FORMS = {
    "float": "float",
    "calibrated": "calibrated",
    "quantized": "quantized",
    "packed file": "packed",
    "ONNX file": "onnx",
}


def write_result(
    folder: RunFolder,
    model: nn.Module,
    original: nn.Module,
    task: Task[Any],
    measured: dict[str, dict[str, Any]],
    notes: Sequence[str],
    search: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``result.json``, ``metrics.jsonl`` of all trainings, and ``report.html``; return the result.

    model: trained; original: float. measured: what each step returned, by the form of the model. search: what the
    report shows of a search.
    """
    recipe, plan = folder.recipe(), Plan.load(folder / "plan.json")
    quantized = dict(measured["quantized"])
    fusion = quantized.pop("fusion", None)
    shape = model_shape(original, task.sample(1))
    sizes = size(plan, shape)
    weights, file_bytes = shape.numel * 4, measured["packed"]["file_bytes"]
    stored = {
        "codes": sizes.codes,
        "scales": sizes.scales,
        "float": sizes.floats,
    }
    result = {
        "fewbits": fewbits.__version__,
        "recipe": recipe.name,
        "task": recipe.task,
        "notes": list(notes),
        "headline": task.headline,
        "classes": list(task.classes),
        "seconds": folder.seconds,
        "float": {**measured["float"], "size_bytes": weights + shape.float_bytes, "weight_bytes": weights},
        "calibrated": measured["calibrated"],
        "quantized": {
            **quantized,
            "avg_weight_bits": sizes.average_weight_bits,
            "size_bytes": sizes.total,
            "weight_bytes": sizes.codes + sizes.scales,
        },
        "packed": measured["packed"],
        "onnx": measured.get("onnx"),
        "size": {**stored, "header": file_bytes - sum(stored.values())},
        "plan": {
            "layers": layer_rows(model, shape, sizes, task.sample(task.shown)),
            "not_quantized": not_quantized(model),
            "decided_from": dict(plan.decided_from),
        },
        "histograms": histograms(model),
        "pictures": task.pictures(_forms(task, folder, model, original)),
        "budget": {} if recipe.budget is None else recipe.budget.model_dump(exclude_none=True),
        "environment": environment(),
    }
    if search is not None:
        result["search"] = search
    if fusion is not None:
        result["fusion"] = fusion
    if (groups := group_entry(task, original, model, recipe.evaluate)) is not None:
        result["groups"] = groups
    if recipe.budget is not None and recipe.budget.hardware is not None:
        result["hardware"] = hardware_entry(recipe.budget.hardware, plan, model, shape)
    result = dict(finite(result))
    _gather_metrics(folder)
    put_json(folder / "result.json", result)
    write_report(folder.path)
    return result


def _forms(task: Task[Any], folder: RunFolder, model: nn.Module, original: nn.Module) -> dict[str, nn.Module]:
    """Return the forms that a task pictures: trained, in float, and as it was when its ranges were set.

    The last is made again from its state, which is not done where training began with another structure.
    """
    recipe, found = folder.recipe(), {"float": original, "quantized": model}
    if "calibrated" in task.forms and recipe.fusion is None and recipe.learned_bits is None:
        before = quantize(copy.deepcopy(original), Plan.load(folder / "plan.json"), verbose=False)
        before.load_state_dict(folder.state("calibrate"))
        found["calibrated"] = before
    return {form: found[form] for form in task.forms if form in found}


def environment() -> dict[str, Any]:
    """Return versions and machine, by name."""
    found: dict[str, Any] = {"python": platform.python_version(), "fewbits": fewbits.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return found | {
        "platform": platform.platform(),
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": device,
    }


def _gather_metrics(folder: RunFolder) -> None:
    """Put the lines of the float training before those of the quantized one; doing it twice changes nothing."""
    first, second = folder / "float/metrics.jsonl", folder / "metrics.jsonl"
    before = first.read_text(encoding="utf-8") if first.is_file() else ""
    after = second.read_text(encoding="utf-8") if second.is_file() else ""
    put(second, (before + after.removeprefix(before)).encode())


def summary(result: dict[str, Any]) -> Table:
    """Return the forms of the model side by side: headline metric, bytes, speed."""
    table = Table(title=result["recipe"], title_justify="left")
    headline = result["headline"]
    for column in ("model", metric(headline).label, "weights", "file", "smaller", "latency"):
        table.add_column(column, justify="left" if column == "model" else "right")
    before, onnx = result["float"], result["onnx"] or {}
    float_file = onnx.get("float_file_bytes") or before["size_bytes"]
    for name, key in FORMS.items():
        if not result[key]:
            continue
        form, is_float = result[key], key == "float"
        weights, file = form.get("weight_bytes"), float_file if is_float else form.get("file_bytes")
        latency = onnx.get("float_latency_ms") if is_float else form.get("latency_ms")
        factor = float_file / file if file else before["weight_bytes"] / weights if weights else None
        cells = [measure(headline, form["metrics"][headline])]
        cells += ["" if count is None else f"{count:,} B" for count in (weights, file)]
        cells += ["" if factor is None or is_float else f"{factor:.1f}x"]
        cells += ["" if latency is None else f"{latency:.3f} ms"]
        table.add_row(name, *cells)
    return table
