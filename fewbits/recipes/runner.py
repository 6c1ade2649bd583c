"""Running a recipe: from the float model to a verified few-bit file and its report.

The steps go one way, and each leaves in the run folder what the next one reads; so a killed run is resumed by
running it again. What is trained never sees the test images: they are for the numbers that are reported.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.deploy import align_biases, code_mismatches, load, pack, save, verify
from fewbits.deploy.onnx_export import export_float, export_onnx
from fewbits.deploy.verify import open_session
from fewbits.errors import ExportError
from fewbits.layers import calibrate, quantize
from fewbits.plan import Plan
from fewbits.recipes.folder import RunFolder
from fewbits.recipes.images import build, load_images
from fewbits.recipes.planning import check_plan, make_plan
from fewbits.recipes.results import write_result
from fewbits.recipes.schema import Recipe, Training
from fewbits.tasks.classification import cross_entropy, predict, score
from fewbits.tasks.data import Batch, LabelledImages
from fewbits.train import Batches, fit

Say = Callable[[str], None]
SENSITIVITY_BATCHES = 8


def run(recipe: Recipe, out: Path, *, replace: bool = False, say: Say = print) -> dict[str, Any]:
    """Run a recipe in the folder ``out`` and return what ``result.json`` holds.

    replace: a run that is there is removed first. say: is told of each step.
    Raises CheckpointError, before any work, for a folder that cannot be written or holds a run, and ExportError,
    after the report is written, where the packed or the exported model does not answer as the trained one.
    """
    return finish(RunFolder.create(out, recipe, replace), say)


def finish(folder: RunFolder, say: Say = print) -> dict[str, Any]:
    """Do the steps of a run that are not done yet; see ``run``."""
    return _Run(folder, say).finish()


class _Run:
    """The moving parts of one run: the model goes from float to quantized to trained, in place."""

    def __init__(self, folder: RunFolder, say: Say) -> None:
        self.folder, self.say, self.recipe = folder, say, folder.recipe()
        self.images = load_images(self.recipe)
        self.model, notes = build(self.recipe, self.images)
        self.notes = [*self.images.notes, *notes]
        for note in self.notes:
            say(f"note: {note}")

    def finish(self) -> dict[str, Any]:
        """See ``finish``."""
        measured = {"float": self.once("float", self.train_float, keep=True)}
        original = copy.deepcopy(self.model)
        self.once("plan", self.plan)
        plan = Plan.load(self.folder / "plan.json")
        quantize(self.model, plan, verbose=not self.folder.done("calibrate"))
        measured["calibrated"] = self.once("calibrate", self.calibrate, keep=True)
        measured["quantized"] = self.once("train", self.train, keep=True)
        measured["packed"] = self.once("pack", functools.partial(self.pack, original))
        packed = load(self.folder / "model.safetensors", copy.deepcopy(original))
        self.once("export", functools.partial(self.export, packed, original))
        measured["onnx"] = self.once("verify", functools.partial(self.verify, packed))
        result = write_result(self.folder, self.model, original, self.images, measured, self.notes)
        require_faithful(result, self.recipe)
        return result

    def once(self, name: str, work: Callable[[], dict[str, Any]], keep: bool = False) -> dict[str, Any]:
        """Do a step unless it is done; keep: it changes the model."""
        before = self.folder.done(name)
        result = self.folder.once(name, work, self.model if keep else None)
        top1 = result.get("metrics", {}).get("top1")
        said = f"{name:<10}" + ("" if top1 is None else f"top-1 {top1:6.2f} %  ")
        self.say(said + ("done before" if before else f"{self.folder.seconds[name]:.1f} s"))
        return result

    def train_float(self) -> dict[str, Any]:
        """Bring the float model to its accuracy. What will not work later is found out before."""
        training = self.recipe.float_training
        if training is not None:
            check_plan(self.model, self.recipe, self.images.sample(1), self.batches())
            self.fit(training, "float", self.folder / "float")
        return self.measure(self.model)

    def plan(self) -> dict[str, Any]:
        """Decide the plan."""
        plan = make_plan(self.model, self.recipe, self.images.sample(1), self.batches())
        plan.save(self.folder / "plan.json")
        return {}

    def calibrate(self) -> dict[str, Any]:
        """Set the ranges of activations."""
        calibrate(self.model, [self.calibration_images()])
        return self.measure(self.model)

    def train(self) -> dict[str, Any]:
        """Train the quantized model; the last weights are the result, there is no choice among epochs."""
        if self.recipe.qat is not None:
            self.fit(self.recipe.qat, "train", self.folder.path, Plan.load(self.folder / "plan.json"))
        export, moved = self.recipe.export, {}
        if export.align_biases and export.mode == "fastest":
            moved = align_biases(self.model, self.images.sample(2))
        return {**self.measure(self.model), "bias_moved": max(moved.values(), default=0.0)}

    def pack(self, original: nn.Module) -> dict[str, Any]:
        """Write the packed file, and hold what is read back from it against the trained model."""
        trained = self.logits(self.model)
        unfolded = self.logits(pack(self.model))
        path = self.folder / "model.safetensors"
        size = save(pack(self.model, self.images.sample(2)), path)
        packed = load(path, copy.deepcopy(original))
        logits = self.logits(packed)
        return {
            "metrics": score(logits, self.images.test.labels),
            "file_bytes": size,
            "code_mismatches": code_mismatches(self.model, packed),
            "bit_equal_before_folding": bool(torch.equal(trained, unfolded)),
            "max_abs_diff": float((logits - trained).abs().max()),
            "top1_agreement": 100 * float((logits.argmax(1) == trained.argmax(1)).float().mean()),
        }

    def export(self, packed: nn.Module, original: nn.Module) -> dict[str, Any]:
        """Write the ONNX file, and that of the float model to compare with."""
        example, float_path = self.images.sample(2), self.folder / "float/model.onnx"
        if self.recipe.export.time_float:
            float_path.parent.mkdir(exist_ok=True)
            export_float(original, float_path, example)
        report = export_onnx(packed, self.folder / "model.onnx", example, mode=self.recipe.export.mode)
        return {"opset": report.opset, "weight_types": report.weight_types}

    def verify(self, packed: nn.Module) -> dict[str, Any]:
        """Run the ONNX file on the test images, and hold it against the packed model."""
        path, given = self.folder / "model.onnx", self.recipe.export
        inputs = (images for images, _ in self.images.test.batches(self.recipe.evaluate.batch_size))
        float_path = self.folder / "float/model.onnx" if given.time_float else None
        report = verify(path, packed, inputs, float_onnx=float_path, threads=given.threads, min_agreement=0)
        return {
            "metrics": onnx_metrics(path, self.images.test, self.recipe.evaluate.batch_size, given.threads),
            "file_bytes": path.stat().st_size,
            "float_file_bytes": None if float_path is None else float_path.stat().st_size,
            "mode": given.mode,
            "engine": report.engine,
            "threads": given.threads,
            "top1_agreement": report.top1_agreement,
            "max_abs_diff": report.max_abs_diff,
            "latency_ms": report.latency_ms,
            "float_latency_ms": report.float_latency_ms,
            "notes": list(report.notes),
        }

    def fit(self, training: Training, stage: str, out: Path, plan: Plan | None = None) -> None:
        """Train the model from where it is, or from the last checkpoint in ``out``."""
        validation, size = self.images.validation, self.recipe.evaluate.batch_size
        fit(
            self.model,
            Batches(self.images.train, training.batch_size, seed=self.recipe.seed),
            functools.partial(cross_entropy, label_smoothing=training.label_smoothing),
            training.fit_config(self.recipe.seed),
            evaluate=None if validation is None else lambda m: score(predict(m, validation, size), validation.labels),
            out=out,
            plan=plan,
            stage=stage,
            resume=True,
        )
        self.model.cpu()

    def logits(self, model: nn.Module) -> Tensor:
        """Return the answers to all test images."""
        return predict(model, self.images.test, self.recipe.evaluate.batch_size)

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """Return the metrics on the test images."""
        return {"metrics": score(self.logits(model), self.images.test.labels)}

    def calibration_images(self) -> Tensor:
        """Return a stratified sample of the training images, as one batch."""
        train = self.images.train
        chosen = train.subset(min(self.recipe.evaluate.calibration_examples, len(train)), self.recipe.seed)
        return chosen.gather(range(len(chosen)))[0]

    def batches(self) -> Iterator[Batch]:
        """Iterate over the labelled training images that a sensitivity is measured on."""
        train = self.images.train
        chosen = train.subset(min(32 * SENSITIVITY_BATCHES, len(train)), self.recipe.seed)
        return chosen.batches(32)


def onnx_metrics(path: Path, test: LabelledImages, batch_size: int, threads: int) -> dict[str, Any]:
    """Return the metrics of an ONNX file in ONNX Runtime."""
    answer = open_session(path, threads)
    return score(predict(lambda x: torch.from_numpy(answer((x,))), test, batch_size), test.labels)


def require_faithful(result: dict[str, Any], recipe: Recipe) -> None:
    """Raise ExportError where the packed or the exported model does not answer as the trained one."""
    packed, onnx = result["packed"], result["onnx"]
    if packed["code_mismatches"] or not packed["bit_equal_before_folding"]:
        raise ExportError(
            f"the packed model is not the trained one: {packed['code_mismatches']} codes differ, logits before norms "
            f"are folded are {'equal' if packed['bit_equal_before_folding'] else 'not equal'}; see result.json"
        )
    if onnx["top1_agreement"] < recipe.export.min_agreement:
        raise ExportError(
            f"ONNX Runtime gives the packed model's answer for {onnx['top1_agreement']:.2f} % of the test images, "
            f"export.min_agreement asks for {recipe.export.min_agreement:g} %; see result.json"
        )
