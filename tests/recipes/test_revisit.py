from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fewbits.errors import ExportError, PackedFileError, RecipeError
from fewbits.recipes.revisit import bench, reexport, repack, reverify
from tests.recipes.runs import packed_content


@pytest.fixture
def folder(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run that may be damaged."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def test_packing_again_writes_the_same_file(folder: Path) -> None:
    found = repack(folder, folder / "again.safetensors")
    assert found["code_mismatches"] == 0
    assert packed_content(folder / "again.safetensors") == packed_content(folder / "model.safetensors")


def test_the_smallest_onnx_file_is_smaller(folder: Path) -> None:
    found = reexport(folder / "model.safetensors", "smallest", folder / "small.onnx")
    assert found["file_bytes"] == (folder / "small.onnx").stat().st_size < (folder / "model.onnx").stat().st_size
    assert found["mode"] == "smallest" and "INT2" in found["weight_types"].values()
    assert reverify(folder, folder / "small.onnx", 1)["samples"] == 80


def test_verifying_tells_agreement_and_speed(folder: Path) -> None:
    found = reverify(folder, None, 1)
    assert found["code_mismatches"] == 0 and found["samples"] == 80
    assert found["latency_ms"] > 0 and found["float_latency_ms"] > 0


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_packed_file_is_told(folder: Path, damage: str) -> None:
    path = folder / "model.safetensors"
    payload = bytearray(path.read_bytes())
    payload[-100] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(payload if damage == "flipped" else payload[:500])
    for verb in (lambda: reverify(folder, None, 1), lambda: reexport(folder, None, None)):
        with pytest.raises(PackedFileError, match=r"model\.safetensors"):
            verb()


def test_a_packed_file_of_another_training_is_told(folder: Path) -> None:
    shutil.copy(folder / "steps/calibrate.pt", folder / "steps/train.pt")
    with pytest.raises(ExportError, match="is not what was trained: [0-9]+ codes differ"):
        reverify(folder, None, 1)


def test_a_damaged_onnx_file_is_told(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(ExportError, match=r"model\.onnx"):
        reverify(folder, None, 1)


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is no run folder"):
        bench(tmp_path, 1, 1, 1)


def test_times_are_those_of_all_forms(folder: Path) -> None:
    shutil.rmtree(folder / "float")  # it is made again
    found = bench(folder, 2, 1, 2)
    assert set(found["ms"]) == {"onnx float", "onnx quantized", "torch float", "torch quantized"}
    assert all(ms > 0 for ms in found["ms"].values())
    assert found["ratio_to_float"]["onnx quantized"] == found["ms"]["onnx quantized"] / found["ms"]["onnx float"]
    assert found["input"] == [2, 1, 8, 8]
    alone = bench(folder / "model.onnx", 3, 1, 1)
    assert list(alone["ms"]) == ["onnx"] and alone["input"] == [3, 1, 8, 8]
