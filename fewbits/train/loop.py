"""The training loop: short, and exact to the bit when resumed.

A step reads ``accumulate`` batches, so the position in the data is a pure function of the step. On CUDA, "to the bit"
holds as far as torch's kernels are deterministic (``torch.use_deterministic_algorithms``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fewbits.errors import TrainingError
from fewbits.plan import Plan
from fewbits.train.checkpoint import Checkpoints
from fewbits.train.config import FitConfig
from fewbits.train.data import BatchSource, as_batches
from fewbits.train.hooks import Hook
from fewbits.train.launch import launch
from fewbits.train.log import MetricsLog, progress_bar, scalars
from fewbits.train.staging import Loss as Loss
from fewbits.train.staging import OneStage, Staged
from fewbits.train.start import first_state, open_folder, steps_per_epoch
from fewbits.train.state import TrainState

Evaluate = Callable[[nn.Module], Mapping[str, Any]]


@dataclass(frozen=True)
class FitResult:
    """What a run ends with: its steps, the numbers of the last evaluation, the plan, the last checkpoint (None without
    ``out``), and the seconds that this process took."""

    steps: int
    metrics: dict[str, float]
    plan: Plan | None
    checkpoint: Path | None
    seconds: float


def fit(
    model: nn.Module,
    batches: BatchSource | DataLoader[Any],
    loss: Loss,
    config: FitConfig,
    *,
    evaluate: Evaluate | None = None,
    out: Path | str | None = None,
    hooks: Sequence[Hook] = (),
    plan: Plan | None = None,
    stage: str = "train",
    stages: Staged | None = None,
    resume: bool = False,
) -> FitResult:
    """Train ``model`` in place.

    batches: a ``BatchSource`` (``Batches``), or a torch DataLoader, which is then shuffled by ``config.seed``.
    loss: (model, batch) -> scalar, the mean over the batch. evaluate: model in eval mode -> metrics, run without
    gradients after every epoch and at the end; single numbers are logged. out: folder for ``metrics.jsonl``,
    ``tensorboard/`` and ``checkpoints/``; None: nothing is written. stage: name of the run in its log. stages: a
    curriculum, each stage with an optimizer and a schedule of its own; None: all is trained at once. resume: go on
    from the last good checkpoint in ``out`` (from the start where there is none yet), given the same arguments and a
    model of the same architecture. Seeds the global random number generators.

    Raises TrainingError for what cannot be run and for a loss or gradient that is not finite; CheckpointError for a
    folder that cannot be written or that holds another run, and where checkpoints are damaged.
    """
    started = time.perf_counter()
    folder = None if out is None else Path(out)
    fabric = launch(config)
    checkpoint = None if folder is None else open_folder(fabric, folder, config, resume)
    source = as_batches(batches, config.seed).for_rank(fabric.global_rank, fabric.world_size)
    course = stages or OneStage()
    try:
        course.start(model, config.total_steps(steps_per_epoch(source, config)), loss)
        state = first_state(fabric, model, source, config, hooks, plan, stage, course, fresh=checkpoint is None)
        run = _Run(state, source, evaluate, folder, checkpoint)
        run.train()
    finally:
        course.leave()
    return FitResult(state.step, dict(state.metrics), state.plan, run.checkpoint, time.perf_counter() - started)


class _Run:
    """The moving parts of one call of ``fit``."""

    def __init__(
        self,
        state: TrainState,
        source: BatchSource,
        evaluate: Evaluate | None,
        folder: Path | None,
        checkpoint: Path | None,
    ) -> None:
        self.state, self.source, self.evaluate = state, source, evaluate
        self.checkpoint = checkpoint
        self.log: MetricsLog | None = None
        self.checkpoints = None if folder is None else Checkpoints(folder / "checkpoints", state.config.keep)
        resume_at = None if checkpoint is None else self._resume(checkpoint)
        if folder is not None and state.fabric.is_global_zero:
            self.log = MetricsLog(folder, resume_at)

    def _resume(self, path: Path) -> tuple[int, int]:
        saved = Checkpoints.read(path)
        self.state.load_state_dict(saved, str(path))
        return self.state.step, saved["metrics_bytes"]

    def train(self) -> None:
        """Run all steps that are left; leave the averaged weights in the model if there is an average."""
        state = self.state
        with ExitStack() as stack:
            if self.log is not None:
                stack.callback(self.log.close)
            progress = stack.enter_context(progress_bar(state.config.progress and state.fabric.is_global_zero))
            task = progress.add_task(state.stage, total=state.total_steps, completed=state.step, status="")
            while state.step < state.total_steps:
                if state.step == state.stages.ends[state.part]:
                    self._next_stage()
                self._step()
                self._after_step()
                progress.update(task, completed=state.step, status=self._status())
        if state.ema is not None:
            state.ema.copy_to_model()

    def _status(self) -> str:
        evaluated = [f"{name} {value:.4g}" for name, value in list(self.state.metrics.items())[:1]]
        return "  ".join([f"loss {self.state.loss:.4g}", *evaluated])

    def _next_stage(self) -> None:
        state = self.state
        state.begin(state.part + 1, fresh=True)
        state.announce()

    def _step(self) -> None:
        """One update of the weights."""
        state = self.state
        state.logs.clear()
        if len(state.stages.ends) > 1:
            state.logs["curriculum/stage"] = state.part + 1
        state.call("before_step")
        state.loss = self._backward()
        self._require_finite("loss", state.loss)
        state.call("after_backward")
        state.logs["lr"] = state.optimizer.param_groups[0]["lr"]
        if state.config.clip is not None:
            norm = state.fabric.clip_gradients(
                state.module, state.stepper, max_norm=state.config.clip, error_if_nonfinite=False
            )
            state.logs["grad_norm"] = float(norm)
            self._require_finite("gradient norm", float(norm))
        state.stepper.step()
        state.schedule.step()
        if state.ema is not None:
            state.ema.update()
        state.step += 1
        state.call("after_step")
        state.optimizer.zero_grad()

    def _backward(self) -> float:
        """Accumulate the gradients of one step; return the mean loss over its batches and all processes."""
        state, fabric = self.state, self.state.fabric
        first = state.step % state.steps_per_epoch * state.config.accumulate
        indices = range(first, min(first + state.config.accumulate, len(self.source)))
        loss, total = state.stages.losses[state.part], torch.zeros((), device=fabric.device)
        for index in indices:
            batch = fabric.to_device(self.source.batch(state.epoch, index))
            with fabric.no_backward_sync(state.module, enabled=index != indices[-1]):
                value = self._checked(loss(state.module, batch)) / len(indices)
                fabric.backward(value)
            total += value.detach()
        return float(fabric.all_reduce(total, reduce_op="mean"))

    @staticmethod
    def _checked(value: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            gradient = " without a gradient" if isinstance(value, Tensor) and not value.requires_grad else ""
            raise TrainingError(
                f"loss(model, batch) must return one number with a gradient, got {found}{gradient}; return the mean "
                "over the batch, not detached, of a model with parameters that require grad"
            )
        return value.reshape(())

    def _require_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        last = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "there is no checkpoint yet"
        raise TrainingError(
            f"the {what} of step {self.state.step} is {value}; {last}. Its weights are not updated. Try a lower lr, "
            "warmup_steps, or clip"
        )

    def _after_step(self) -> None:
        """Log, evaluate and save, as they are due. Saving comes last: what a checkpoint follows is in the log."""
        state = self.state
        last = state.step == state.total_steps
        if last or state.step % state.config.log_every == 0:
            self._write({"loss": state.loss, **state.logs})
        if self.evaluate is not None and (last or state.step % state.steps_per_epoch == 0):
            state.metrics = self._evaluated(self.evaluate)
            self._write(state.metrics, group="eval")
        if self.checkpoints is not None and (last or state.step % state.config.checkpoint_every == 0):
            self._save(self.checkpoints)

    def _write(self, numbers: Mapping[str, float], group: str | None = None) -> None:
        if self.log is not None:
            epoch = (self.state.step - 1) // self.state.steps_per_epoch
            self.log.write({"step": self.state.step, "epoch": epoch, "stage": self.state.stage}, numbers, group)

    def _evaluated(self, evaluate: Evaluate) -> dict[str, float]:
        """Evaluate the (averaged) weights in eval mode, and put every submodule back into its mode."""
        state = self.state
        modes = [(module, module.training) for module in state.model.modules()]
        state.model.eval()
        with ExitStack() as stack:
            if state.ema is not None:
                stack.enter_context(state.ema.applied())
            with torch.no_grad():
                metrics = scalars(evaluate(state.model))
        for module, training in modes:
            module.training = training
        shared: dict[str, float] = state.fabric.broadcast(metrics)
        return shared

    def _save(self, checkpoints: Checkpoints) -> None:
        saved = self.state.state_dict()
        path = None
        if self.log is not None:
            path = checkpoints.save(self.state.step, {**saved, "metrics_bytes": self.log.sync()})
        self.checkpoint = self.state.fabric.broadcast(path)
