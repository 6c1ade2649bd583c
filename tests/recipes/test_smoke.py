"""Every recipe that comes with fewbits runs end to end anywhere, and leaves the run folder that tools rely on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fewbits.deploy import PackedLayer, load
from fewbits.plan import Plan, TensorPlan
from fewbits.recipes.folder import RunFolder
from fewbits.recipes.read import find, names, read
from fewbits.recipes.results import summary
from fewbits.recipes.runner import run
from fewbits.recipes.tasks import load_task
from fewbits.report.load import read_log, read_result
from fewbits.report.summary import main_metric

pytestmark = pytest.mark.timeout(300)  # a run takes seconds, but a busy machine shares them out
FILES = ("recipe.yaml", "plan.json", "metrics.jsonl", "model.safetensors", "model.onnx", "result.json", "report.html")
ACCURACIES = {
    "classification": "top1",
    "language": "token_accuracy",
    "segmentation": "miou",
    "detection": "map",
    "open_vocabulary": "map",
}
EMBEDDED = ("digits", "digits_groups", "scenes", "composed")
KEYS = {
    "float": ("metrics", "size_bytes"),
    "quantized": ("metrics", "avg_weight_bits", "size_bytes"),
    "packed": ("metrics", "file_bytes", "code_mismatches"),
    "onnx": ("metrics", "file_bytes", "top1_agreement", "max_abs_diff"),
    "seconds": ("total", "train"),
    "plan": ("layers",),
}


@pytest.fixture(scope="module", autouse=True)
def no_shared_data() -> Iterator[None]:
    """All runs as on a machine that has no data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.tasks.sources.shared_data_dir", lambda: None)
        patch.setattr("fewbits.recipes.images.shared_data_dir", lambda: None)
        patch.setattr("fewbits.tasks.text.shared_data_dir", lambda: None)
        patch.setattr("fewbits.tasks.detection_sources.shared_data_dir", lambda: None)
        yield


@pytest.fixture(scope="module", params=names())
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a smoke run of each recipe."""
    path = tmp_path_factory.mktemp("smoke") / request.param
    run(read(find(request.param)).smoked(), path, say=lambda text: None)
    return path


def test_a_smoke_run_leaves_the_whole_run_folder(folder: Path) -> None:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    exported = RunFolder.open(folder).recipe().export is not None
    for name in FILES:
        assert (name == "model.onnx" and not exported) or (folder / name).stat().st_size > 0, name
    assert list((folder / "checkpoints").glob("*.pt"))
    for part, keys in KEYS.items():
        if part == "onnx" and not exported:
            assert result["onnx"] is None
            continue
        assert set(keys) <= set(result[part]), part
    assert {"task", "budget", "environment"} <= set(result)
    assert result["recipe"] == folder.name
    assert result["environment"]["torch"]
    for form in ("float", "quantized", "packed", *(["onnx"] if exported else [])):
        metrics = result[form]["metrics"]
        assert result["headline"] in metrics
        assert 0 <= metrics[ACCURACIES[result["task"]]] <= 100


def stored_bits(weight: TensorPlan) -> float:
    """Bits of a weight in the file: its own, or those of the kept ones and of their positions."""
    pattern = weight.pattern
    return weight.mean_bits if pattern is None else pattern.kept * (weight.bits + pattern.position_bits) / pattern.of


def test_what_a_smoke_run_leaves_holds_together(folder: Path) -> None:
    result = read_result(folder / "result.json")
    assert result.packed is not None and result.size is not None and result.quantized is not None
    assert result.packed.code_mismatches == 0
    assert result.packed.file_bytes == (folder / "model.safetensors").stat().st_size
    assert sum(v or 0 for v in result.size.values()) == result.packed.file_bytes
    assert result.size["header"] > 0, "the predicted bytes are those of the tensors in the file"
    plan = {name: layer.weight for name, layer in Plan.load(folder / "plan.json") if layer and layer.weight}
    bits = {layer.name: layer.parameters * stored_bits(plan[layer.name]) for layer in result.layers if layer.parameters}
    total = ((result.reference and result.reference.weight_bytes) or 0) / 4
    in_float = total - sum(layer.parameters or 0 for layer in result.layers)
    assert result.quantized.avg_weight_bits == pytest.approx((sum(bits.values()) + 32 * in_float) / total)
    stages = {line["stage"] for line in read_log(folder / "metrics.jsonl").lines}
    assert stages == {"float", "train"}
    assert main_metric(result) == json.loads((folder / "result.json").read_text())["headline"]
    assert summary(json.loads((folder / "result.json").read_text())).row_count == (5 if result.onnx else 4)


def test_the_packed_file_loads_into_the_model_of_the_recipe(folder: Path) -> None:
    recipe = RunFolder.open(folder).recipe()
    task = load_task(recipe)
    packed = load(folder / "model.safetensors", task.build(recipe)[0])
    outputs, right = next(iter(task.answers(packed, task.test, 2)))
    same = task.agreement(outputs, outputs)
    assert same.all()
    if recipe.task not in (
        "detection",
        "open_vocabulary",
    ):  # where the answers are what was found, and not one for each right one
        assert len(same) == right.numel(), "one answer for each that is right or wrong"
    planned = {name for name, layer in Plan.load(folder / "plan.json") if layer is not None and layer.weight}
    assert {name for name, layer in packed.named_modules() if isinstance(layer, PackedLayer)} == planned


def test_stand_ins_are_said_to_be_what_they_are(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    missing = read(find(folder.name)).data.source not in EMBEDDED
    assert any("in place of" in note for note in result["notes"]) == missing
