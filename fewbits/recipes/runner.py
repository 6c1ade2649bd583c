"""Running a recipe: from the float model to a verified few-bit file and its report.

The steps go one way, and each leaves in the run folder what the next one reads; so a killed run is resumed by
running it again. What is trained never sees the test examples: they are for the numbers that are reported.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fewbits.cost import model_shape
from fewbits.deploy import align_biases, code_mismatches, fix_fusion, fold_fusion, load, pack, save, verify
from fewbits.deploy.onnx_export import export_float, export_onnx
from fewbits.layers import balance_fusion, calibrate, quantize, settle_bits, settle_fusion
from fewbits.plan import Plan
from fewbits.recipes.fairly import WithGroups, check_groups, fair_loss, fairness_of, group_batches, require_fair
from fewbits.recipes.faithful import Compared, onnx_metrics, require_faithful
from fewbits.recipes.folder import RunFolder
from fewbits.recipes.fusing import aligned, alignment_weight, check_fusion, fold, require_foldable
from fewbits.recipes.planning import check_plan, make_plan
from fewbits.recipes.results import write_result
from fewbits.recipes.schema import Alignment, Export, Fusion, Recipe, Training
from fewbits.recipes.searching import search, search_entry
from fewbits.recipes.staging import check_stages, check_terms, stages_of
from fewbits.recipes.task import Pair
from fewbits.recipes.tasks import load_task
from fewbits.recipes.widths import learn_bits
from fewbits.report.text import measure, metric
from fewbits.train import BalanceFusion, Batches, FairnessRamp, Hook, Staged, fit
from fewbits.train.loop import Loss

Say = Callable[[str], None]


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
        self.task = load_task(self.recipe)
        check_groups(self.task, self.recipe)
        check_terms(self.recipe, self.task)
        self.model, notes = self.task.build(self.recipe)
        self.notes = [*self.task.notes, *notes]
        for note in self.notes:
            say(f"note: {note}")

    def finish(self) -> dict[str, Any]:
        """See ``finish``."""
        measured = {"float": self.once("float", self.train_float, keep=True)}
        original = copy.deepcopy(self.model)
        if (fusion := self.recipe.fusion) is not None:
            balance_fusion(self.model, self.task.sample(2), fusion.nodes, fusion.settings())
            self.once("settle", self.settle, keep=True)
        searched = self.recipe.search is not None
        found = self.once("search", self.search) if searched else self.once("plan", self.plan)
        plan = self.made_plan
        if self.recipe.from_scratch:
            self.model, _ = self.task.build(self.recipe)
        quantize(self.model, plan, verbose=not self.folder.done("calibrate"))
        if searched:
            self.model.load_state_dict(self.folder.state("searched"))
        measured["calibrated"] = self.once("calibrate", self.calibrate, keep=True)
        measured["quantized"] = self.once("train", functools.partial(self.train, original), keep=True)
        if fusion is not None:
            measured["quantized"] |= self.folded(fusion)
        if self.recipe.learned_bits is not None:
            self.settle_widths()
        measured["packed"] = self.once("pack", functools.partial(self.pack, original))
        if self.recipe.export is not None:
            packed = self.task.deployed(load(self.folder / "model.safetensors", copy.deepcopy(original)))
            self.once("export", functools.partial(self.export, packed, original, self.recipe.export))
            measured["onnx"] = self.once("verify", functools.partial(self.verify, packed, self.recipe.export))
        notes = [*self.notes, *([found["message"]] if found.get("missed") else [])]
        result = write_result(self.folder, self.model, original, self.task, measured, notes, found.get("search"))
        require_faithful(result, self.recipe)
        require_fair(result, self.recipe.evaluate.guard_worst_group)
        return result

    def once(self, name: str, work: Callable[[], dict[str, Any]], keep: bool = False) -> dict[str, Any]:
        """Do a step unless it is done; keep: it changes the model."""
        before = self.folder.done(name)
        result = self.folder.once(name, work, self.model if keep else None)
        key = self.task.headline
        value = result.get("metrics", {}).get(key)
        said = f"{name:<10}" + ("" if value is None else f"{metric(key).label} {measure(key, value):>8}  ")
        self.say(said + ("done before" if before else f"{self.folder.seconds[name]:.1f} s"))
        return result

    def train_float(self) -> dict[str, Any]:
        """Bring the float model to its accuracy. What will not work later is found out before."""
        training = self.recipe.float_training
        if training is not None:
            check_plan(self.model, self.recipe, *self.measured_on())
            check_fusion(self.model, self.recipe, self.task.sample(2))
            check_stages(self.recipe, self.task)
            self.fit(training, "float", self.folder / "float")
        return self.measure(self.model)

    def measured_on(self) -> tuple[Any, ...]:
        """Return what a plan is decided on."""
        groups = functools.partial(group_batches, self.task, self.recipe)
        return self.task.sample(1), self.task.sensitivity(self.recipe), self.task.loss(), groups

    def plan(self) -> dict[str, Any]:
        """Decide the plan."""
        plan = make_plan(self.model, self.recipe, *self.measured_on())
        plan.save(self.folder / "plan.json")
        return {}

    def search(self) -> dict[str, Any]:
        """Search the plan, and keep the weights that were trained on the way."""
        found = search(self.model, self.recipe, self.task, self.folder / "search", self.say)
        self.say(f"search: {found.message}")
        found.plan.save(self.folder / "plan.json")
        self.folder.keep("searched", found.model)
        entry = search_entry(found)
        return {"status": found.status, "message": found.message, "missed": found.missed, "search": entry}

    def settle(self) -> dict[str, Any]:
        """Undo what the norms of the fusion nodes did to the float model."""
        return {"settled": settle_fusion(self.model, self.task.calibration(self.recipe)), **self.measure(self.model)}

    def calibrate(self) -> dict[str, Any]:
        """Set the ranges of activations; a search has done so."""
        if self.recipe.search is None:
            calibrate(self.model, self.task.calibration(self.recipe))
        if self.recipe.fusion is not None:
            require_foldable(self.model, self.recipe.fusion, self.task.calibration(self.recipe))
        return self.measure(self.model)

    def train(self, teacher: nn.Module) -> dict[str, Any]:
        """Train the quantized model; the last weights are the result, there is no choice among epochs."""
        qat, loss, hooks = self.recipe.qat, None, list[Hook]()
        if qat is not None:
            if self.recipe.alignment is not None:
                plain = self.task.loss(qat.label_smoothing)
                loss = aligned(plain, self.model, copy.deepcopy(teacher), self.weighed(plain, teacher, qat.batch_size))
            if self.recipe.fusion is not None:
                hooks.append(self.balance(self.recipe.fusion))
            if (fair := self.recipe.fairness) is not None:
                fairness = fairness_of(self.task, fair)
                loss, hooks = fair_loss(fairness, qat.label_smoothing), [*hooks, FairnessRamp(fairness, fair.ramp)]
            if (learned := self.recipe.learned_bits) is not None:
                shape = functools.partial(model_shape, teacher, self.task.sample(1))
                hooks.append(learn_bits(self.model, learned, self.made_plan, shape))
            stages = stages_of(self.recipe, self.task, self.model, teacher)
            self.fit(qat, "train", self.folder.path, self.made_plan, loss, hooks, stages)
        return self.trained()

    def weighed(self, loss: Loss, teacher: nn.Module, batch_size: int) -> Alignment:
        """Return the rules of alignment, with the weight that a ratio of gradients comes to."""
        rules = self.recipe.alignment
        assert rules is not None
        if rules.ratio is None:
            return rules
        batch = self.task.train.gather(range(min(batch_size, len(self.task.train))))
        found = self.once("weigh", lambda: {"weight": alignment_weight(loss, self.model, teacher, rules, batch)})
        return rules.model_copy(update={"options": {**rules.options, "weight": found["weight"]}})

    def balance(self, rules: Fusion) -> BalanceFusion:
        """Return the hook of the fusion nodes."""
        if rules.fix_at is None:
            return BalanceFusion(rules.freeze_at)
        batches = self.task.calibration(self.recipe)
        return BalanceFusion(rules.freeze_at, fix=functools.partial(fix_fusion, batches=batches), fix_at=rules.fix_at)

    def folded(self, rules: Fusion) -> dict[str, Any]:
        """Fold the fusion nodes into what follows them, and train on for a little; return the metrics after it."""
        before, batches = self.folder.done("fold"), self.task.calibration(self.recipe)
        found = self.once("fold", lambda: fold(self.model, rules, batches, lambda m: self.measure(m)["metrics"]))
        if before:  # by the run that was stopped; its weights are those of the training, or come with the next step
            fold_fusion(self.model, batches, rules.fold)
        last = self.once("finetune", functools.partial(self.finetune, rules), keep=True)
        if rules.finetune_steps:
            found["forms"]["fine-tuned"] = last["metrics"]
        return {**last, "fusion": found}

    def finetune(self, rules: Fusion) -> dict[str, Any]:
        """Train the folded model on the task alone."""
        assert self.recipe.qat is not None  # schema saw to it
        if rules.finetune_steps:
            changes = {"optimizer": "adamw", "lr": rules.finetune_lr, "weight_decay": 0.0, "warmup_steps": 0,
                       "epochs": None, "max_steps": rules.finetune_steps, "ema": None}  # fmt: skip
            self.fit(self.recipe.qat.model_copy(update=changes), "finetune", self.folder / "finetune")
        return self.trained()

    @property
    def made_plan(self) -> Plan:
        """The plan of this run, as it was trained by."""
        before = self.folder / "plan_before.json"
        return Plan.load(before if before.is_file() else self.folder / "plan.json")

    def settle_widths(self) -> None:
        """Put whole widths in the place of learned ones, in the model and in ``plan.json``."""
        plan = self.made_plan
        plan.save(self.folder / "plan_before.json")
        settled = settle_bits(self.model)
        replace(settled, decided_from=dict(plan.decided_from)).save(self.folder / "plan.json")

    def trained(self) -> dict[str, Any]:
        """Bring the trained model to its last form, and measure it."""
        export, moved = self.recipe.export, {}
        if export is not None and export.align_biases and export.mode == "fastest":
            moved = align_biases(self.model, self.task.sample(2))
        return {**self.measure(self.model), "bias_moved": max(moved.values(), default=0.0)}

    def pack(self, original: nn.Module) -> dict[str, Any]:
        """Write the packed file, and hold what is read back from it against the trained model."""
        path = self.folder / "model.safetensors"
        size = save(pack(self.model, self.task.sample(2)), path, self.task.about(self.recipe))
        packed = load(path, copy.deepcopy(original))
        compared = Compared(self.task.agreement)
        pairs = compared.watch(*(self.answers(model) for model in (self.model, pack(self.model), packed)))
        return {
            "metrics": self.task.score(pairs, self.task.test),
            "file_bytes": size,
            "code_mismatches": code_mismatches(self.model, packed),
            "bit_equal_before_folding": compared.bit_equal,
            "max_abs_diff": compared.max_abs_diff,
            "top1_agreement": 100 * compared.agreeing / compared.count,
        }

    def export(self, packed: nn.Module, original: nn.Module, given: Export) -> dict[str, Any]:
        """Write the ONNX file, and that of the float model to compare with."""
        example, float_path = self.task.sample(2), self.folder / "float/model.onnx"
        if given.time_float:
            float_path.parent.mkdir(exist_ok=True)
            export_float(self.task.deployed(copy.deepcopy(original)), float_path, example)
        report = export_onnx(packed, self.folder / "model.onnx", example, mode=given.mode)
        return {"opset": report.opset, "weight_types": report.weight_types}

    def verify(self, packed: nn.Module, given: Export) -> dict[str, Any]:
        """Run the ONNX file on the test examples, and hold it against the packed model."""
        path, size = self.folder / "model.onnx", self.recipe.evaluate.batch_size
        inputs = (x for x, _ in self.task.test.batches(size))
        float_path = self.folder / "float/model.onnx" if given.time_float else None
        report = verify(
            path,
            packed,
            inputs,
            float_onnx=float_path,
            threads=given.threads,
            min_agreement=0,
            agreement=self.task.agreement,
        )
        return {
            "metrics": onnx_metrics(path, self.task, size, given.threads),
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

    def fit(
        self,
        training: Training,
        stage: str,
        out: Path,
        plan: Plan | None = None,
        loss: Loss | None = None,
        hooks: Sequence[Hook] = (),
        stages: Staged | None = None,
    ) -> None:
        """Train the model from where it is, or from the last checkpoint in ``out``; loss: None for the task's."""
        task, size = self.task, self.recipe.evaluate.batch_size
        validation = task.validation
        examples = WithGroups(task.train) if stage == "train" and self.recipe.fairness is not None else task.train
        fit(
            self.model,
            Batches(examples, training.batch_size, seed=self.recipe.seed),
            loss or task.loss(training.label_smoothing),
            training.fit_config(self.recipe.seed),
            evaluate=None if validation is None else lambda model: task.evaluate(model, validation, size),
            out=out,
            plan=plan,
            stage=stage,
            hooks=hooks,
            stages=stages,
            resume=True,
        )
        self.model.cpu()

    def answers(self, model: nn.Module) -> Iterator[Pair]:
        """Return the answers to all test inputs, beside the right ones."""
        return self.task.answers(model, self.task.test, self.recipe.evaluate.batch_size)

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """Return the metrics on the test examples."""
        return {"metrics": self.task.score(self.answers(model), self.task.test)}
