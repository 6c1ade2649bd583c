"""What a run begins with: its folder, and its state before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fewbits.errors import CheckpointError
from fewbits.plan import Plan
from fewbits.train import rng
from fewbits.train.checkpoint import Checkpoints, prepare_folder
from fewbits.train.config import FitConfig
from fewbits.train.data import BatchSource
from fewbits.train.ema import Ema
from fewbits.train.hooks import Hook
from fewbits.train.launch import require_calibrated
from fewbits.train.staging import OneStage, Staged
from fewbits.train.state import TrainState, plan_data


def open_folder(fabric: Any, folder: Path, config: FitConfig, resume: bool) -> Path | None:
    """Prepare the folder and return the checkpoint to go on from."""
    found = None
    if fabric.is_global_zero:
        prepare_folder(folder / "checkpoints")
        checkpoints = Checkpoints(folder / "checkpoints", config.keep)
        if resume:
            found = checkpoints.last_good()
        elif checkpoints.paths() or (folder / "metrics.jsonl").exists():
            raise CheckpointError(
                f"{folder} holds a run already; go on with it (resume=True), or choose another output folder"
            )
    where: Path | None = fabric.broadcast(found)
    return where


def steps_per_epoch(source: BatchSource, config: FitConfig) -> int:
    """Return the updates of one pass over the batches."""
    return -(-len(source) // config.accumulate)


def first_state(
    fabric: Any,
    model: nn.Module,
    source: BatchSource,
    config: FitConfig,
    hooks: Sequence[Hook],
    plan: Plan | None,
    stage: str,
    stages: OneStage,
    *,
    fresh: bool,
) -> TrainState:
    """Set up everything as it is before the first step; fresh False: a checkpoint will be loaded over it."""
    if not isinstance(stages, Staged):  # which calibrates on the same batches everywhere
        require_calibrated(model, fabric.world_size)
    rng.seed_all(config.seed, fabric.global_rank)
    given = {
        "config": config.identity(),
        "batches": source.identity(),
        "plan": plan_data(plan),
        "stage": stage,
        "hooks": [type(hook).__name__ for hook in hooks],
        "device": fabric.device.type,
        "processes": fabric.world_size,
        **stages.identity(),
    }
    state = TrainState(
        fabric, config, model, stages, None if config.ema is None else Ema(model, config.ema),
        tuple(hooks), plan, stage, steps_per_epoch(source, config), stages.ends[-1], given,
    )  # fmt: skip
    state.begin(0, fresh=fresh)
    state.call("on_start")
    state.announce()
    return state
