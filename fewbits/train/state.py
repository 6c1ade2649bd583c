"""The state of a run: everything that it needs to go on."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fewbits.errors import CheckpointError
from fewbits.plan import Plan
from fewbits.train import rng
from fewbits.train.config import FitConfig
from fewbits.train.ema import Ema
from fewbits.train.hooks import Hook
from fewbits.train.optim import make_optimizer, make_schedule
from fewbits.train.staging import OneStage

FORMAT = 1


@dataclass
class TrainState:
    """What hooks see and checkpoints hold.

    model: the bare model; module: the same one as the loop calls it (device, precision, DDP). optimizer, stepper: bare
    and as the loop calls it. stages: what is trained when; part: the present one, from 0. step: updates done.
    loss: of the last step, mean over its batches and all processes. logs: what hooks want logged for this step.
    metrics: numbers of the last evaluation. given: what a resumed run must have in common with this one.
    """

    fabric: Any
    config: FitConfig
    model: nn.Module
    stages: OneStage
    ema: Ema | None
    hooks: Sequence[Hook]
    plan: Plan | None
    stage: str
    steps_per_epoch: int
    total_steps: int
    given: dict[str, Any]
    module: Any = field(init=False)
    optimizer: Optimizer = field(init=False)
    stepper: Any = field(init=False)
    schedule: LambdaLR = field(init=False)
    part: int = 0
    step: int = 0
    loss: float = float("nan")
    logs: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def epoch(self) -> int:
        """The epoch of the next step, from 0."""
        return self.step // self.steps_per_epoch

    def begin(self, part: int, *, fresh: bool) -> None:
        """Begin a stage, with an optimizer and a schedule of its own; fresh False: a checkpoint of it is to follow."""
        self.part = part
        self.stages.enter(part)
        self.module = self.fabric.setup_module(self.model)
        if fresh:
            self.stages.calibrate(part, self.fabric.to_device)
            if self.ema is not None:
                self.ema.renew(self.stages.renewed(part))
        self.optimizer = make_optimizer(self.model, self.config)
        begun, end = [0, *self.stages.ends][part : part + 2]
        self.schedule = make_schedule(self.optimizer, self.config, end - begun)
        self.stepper = self.fabric.setup_optimizers(self.optimizer)

    def announce(self) -> None:
        """Tell the hooks that a stage has begun."""
        self.call("on_stage_change", self.stages.name(self.part, self.stage))

    def call(self, method: str, *args: Any) -> None:
        """Call a method of all hooks."""
        for hook in self.hooks:
            getattr(hook, method)(self, *args)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and plain data. All processes must call it together."""
        return {
            "format": FORMAT,
            "given": self.given,
            "step": self.step,
            "loss": self.loss,
            "metrics": dict(self.metrics),
            "plan": plan_data(self.plan),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "hooks": [hook.state_dict() for hook in self.hooks],
            "rng": _from_all(self.fabric.world_size, rng.get_state(self.fabric.device)),
        }

    def load_state_dict(self, state: Mapping[str, Any], source: str) -> None:
        """Undo ``state_dict``. Raises CheckpointError where ``source`` was written by another kind of run."""
        if state.get("format") != FORMAT:
            raise CheckpointError(
                f"{source} has checkpoint format {state.get('format')!r}, expected {FORMAT}; resume it with the "
                "fewbits that wrote it"
            )
        _require_same(state["given"], self.given, source)
        part = bisect_left(self.stages.ends, state["step"])  # the stage that its last step was in
        if part != self.part:
            self.begin(part, fresh=False)
            self.announce()
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise CheckpointError(f"{source} is of another model: {error}") from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        for hook, saved in zip(self.hooks, state["hooks"]):
            hook.load_state_dict(saved)
        self.step, self.loss, self.metrics = state["step"], state["loss"], dict(state["metrics"])
        self.plan = None if state["plan"] is None else Plan.from_dict(state["plan"])
        rng.set_state(state["rng"][self.fabric.global_rank], self.fabric.device)


def plan_data(plan: Plan | None) -> Any:
    """Return the plan as JSON data: what is compared and stored is what a file would hold."""
    return None if plan is None else json.loads(json.dumps(plan.to_dict()))


def _from_all(world: int, value: Any) -> list[Any]:
    """Return the values of all processes, by rank."""
    if world == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def _require_same(saved: Any, given: Any, source: str) -> None:
    old, new = dict(_leaves(saved)), dict(_leaves(given))
    differ = [k for k in {**old, **new} if old.get(k, "nothing") != new.get(k, "nothing")]
    if differ:
        listed = "; ".join(f"{k} was {old.get(k, 'nothing')!r}, now {new.get(k, 'nothing')!r}" for k in differ[:5])
        more = f"; and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise CheckpointError(
            f"{source} was written by a different run: {listed}{more}. Resume with the same values, or start anew in "
            "another folder"
        )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over (path, value) of all that is not a dict or list."""
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else None
    if not items:
        yield path, value
        return
    for key, inner in items:
        yield from _leaves(inner, f"{path}.{key}" if path else str(key))
