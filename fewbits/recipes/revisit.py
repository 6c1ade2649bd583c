"""Going back to a finished run: pack, export, verify and time its model again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.deploy import code_mismatches, load, pack, save, verify
from fewbits.deploy.onnx_export import export_float, export_onnx
from fewbits.deploy.verify import engine_name, open_session
from fewbits.errors import ExportError
from fewbits.layers import quantize
from fewbits.plan import Plan
from fewbits.recipes.folder import RunFolder
from fewbits.recipes.schema import Export, Recipe
from fewbits.recipes.task import Task
from fewbits.recipes.tasks import load_task

WARM_UP = 5


@dataclass(frozen=True)
class Finished:
    """A run folder whose training is done, with its data. packed_file: ``model.safetensors``, or another."""

    folder: RunFolder
    recipe: Recipe
    task: Task[Any]
    packed_file: Path

    @staticmethod
    def open(target: Path) -> Finished:
        """Open a run folder, or a packed file in one. Raises RecipeError where there is none."""
        folder = RunFolder.open(target)
        recipe = folder.recipe()
        packed_file = target if target.suffix == ".safetensors" else folder / "model.safetensors"
        return Finished(folder, recipe, load_task(recipe), packed_file)

    @property
    def export(self) -> Export:
        """How the recipe exports, or the defaults where it does not."""
        return self.recipe.export or Export()

    def architecture(self) -> nn.Module:
        """Return the float model without its weights."""
        bare = self.recipe.model.model_copy(update={"weights": None})
        return self.task.build(self.recipe.model_copy(update={"model": bare}))[0]

    def float_model(self) -> nn.Module:
        """Return the float model as it was before quantization."""
        model = self.architecture()
        model.load_state_dict(self.folder.state("float"))
        return model.eval()

    def trained(self) -> nn.Module:
        """Return the trained model, not packed."""
        model = quantize(self.float_model(), Plan.load(self.folder / "plan.json"), verbose=False)
        model.load_state_dict(self.folder.state("train"))
        return model.eval()

    def packed(self) -> nn.Module:
        """Return the packed model. Raises PackedFileError for a file that is missing or damaged."""
        return load(self.packed_file, self.architecture())


def repack(target: Path, to: Path | None) -> dict[str, Any]:
    """Pack the trained model of a run again, into ``to`` or its own file."""
    run = Finished.open(target)
    trained, path = run.trained(), to or run.packed_file
    packed = pack(trained, run.task.sample(2))
    size = save(packed, path, run.task.about(run.recipe))
    return {"file": str(path), "file_bytes": size, "code_mismatches": code_mismatches(trained, packed)}


def reexport(target: Path, mode: str | None, to: Path | None) -> dict[str, Any]:
    """Export the packed model of a run, as ``model.onnx`` or ``to``."""
    run = Finished.open(target)
    path = to or run.folder / "model.onnx"
    report = export_onnx(run.task.deployed(run.packed()), path, run.task.sample(2), mode=mode or run.export.mode)
    return {
        "file": str(path),
        "file_bytes": report.file_bytes,
        "opset": report.opset,
        "mode": report.mode,
        "weight_types": report.weight_types,
    }


def reverify(target: Path, onnx: Path | None, threads: int) -> dict[str, Any]:
    """Run the ONNX file of a run, or another, on the test examples beside the packed model."""
    run = Finished.open(target)
    packed, path = run.packed(), onnx or run.folder / "model.onnx"
    if not path.is_file():
        raise ExportError(f"{str(path)!r} does not exist: write it with 'fewbits export', or name another with --onnx")
    mismatches = code_mismatches(run.trained(), packed) if run.folder.done("train") else None
    float_path = run.folder / "float/model.onnx"
    inputs = (x for x, _ in run.task.test.batches(run.recipe.evaluate.batch_size))
    report = verify(
        path,
        run.task.deployed(packed),
        inputs,
        float_onnx=float_path if float_path.is_file() else None,
        threads=threads,
        min_agreement=run.export.min_agreement,
        agreement=run.task.agreement,
    )
    if mismatches:
        raise ExportError(f"{run.packed_file} is not what was trained: {mismatches} codes differ; pack it again")
    return {"file": str(path), "code_mismatches": mismatches, **vars(report)}


def bench(target: Path, batch: int, threads: int, rounds: int) -> dict[str, Any]:
    """Time the forms of a model in turn: ONNX and PyTorch, quantized and float; or an ONNX file alone.

    Returns the median milliseconds of a batch, by form, and each form's ratio to the float of its engine.
    """
    alone = target.suffix == ".onnx" and target.is_file()
    forms, x = _onnx_alone(target, batch, threads) if alone else _forms(Finished.open(target), batch, threads)
    with torch_threads(threads), torch.no_grad():
        times = _median_ms(forms, x, rounds)
    ratios = {name: times[name] / times[name.replace("quantized", "float")] for name in times if "quantized" in name}
    shape = list(x.shape)
    return {"engine": engine_name(), "threads": threads, "input": shape, "ms": times, "ratio_to_float": ratios}


def _forms(run: Finished, batch: int, threads: int) -> tuple[dict[str, Callable[[Tensor], Any]], Tensor]:
    first, forms = run.task.sample(1), _torch_forms(run)
    float_file = run.folder / "float/model.onnx"
    if not (run.folder / "model.onnx").is_file():  # the recipe asked for none
        return forms, first.repeat(batch, *[1] * (first.ndim - 1))
    if not float_file.is_file():
        float_file.parent.mkdir(exist_ok=True)
        export_float(run.task.deployed(run.float_model()), float_file, run.task.sample(2))
    quantized, original = (open_session(path, threads) for path in (run.folder / "model.onnx", float_file))
    onnx: dict[str, Callable[[Tensor], Any]] = {
        "onnx float": lambda x: original((x,)),
        "onnx quantized": lambda x: quantized((x,)),
    }
    return onnx | forms, first.repeat(batch, *[1] * (first.ndim - 1))


def _torch_forms(run: Finished) -> dict[str, Callable[[Tensor], Any]]:
    deployed = run.task.deployed
    return {"torch float": deployed(run.float_model()), "torch quantized": deployed(run.packed())}


def _onnx_alone(path: Path, batch: int, threads: int) -> tuple[dict[str, Callable[[Tensor], Any]], Tensor]:
    import onnx

    answer = open_session(path, threads)
    (given,) = onnx.load(str(path), load_external_data=False).graph.input[:1]
    tokens = given.type.tensor_type.elem_type == onnx.TensorProto.INT64
    sides = [d.dim_value for d in given.type.tensor_type.shape.dim]
    if len(sides) < 2 or not all(sides[1:]):
        raise ExportError(f"{path}: its input has the shape {sides}; only the batch may be open to be timed alone")
    shape = sides[0] or batch, *sides[1:]
    return {"onnx": lambda x: answer((x,))}, torch.zeros(shape, dtype=torch.int64) if tokens else torch.randn(shape)


def _median_ms(forms: dict[str, Callable[[Tensor], Any]], x: Tensor, rounds: int) -> dict[str, float]:
    """Take times in turn, so that whatever else the machine does meets all forms alike.

    A call that is not timed goes before each that is: it brings the form back into the caches.
    """
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + WARM_UP):
        for name, form in forms.items():
            form(x)
            start = time.perf_counter()
            form(x)
            if turn >= WARM_UP:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in taken.items()}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let PyTorch use so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
