"""A tiny training run that can be killed at a chosen moment; runs in processes of their own.

The processes are forked from a server that has imported torch and Fabric once: importing them is what takes time.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.plan import LayerPlan, Plan, TensorPlan
from fewbits.quantizers import make_quantizer
from fewbits.train import Batches, FitConfig, Hook, TrainState, checkpoint, fit, log

PLAN = Plan((("head", LayerPlan(weight=TensorPlan(bits=4, granularity="channel"))),), {"method": "by hand"})


class Noisy:
    """Points in the plane, of two classes, with noise as augmentation."""

    def __init__(self, count: int = 96) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(count, 6, generator=generator)
        self.y = (self.x[:, 0] * self.x[:, 1] > 0).long()

    def __len__(self) -> int:
        return len(self.y)

    def gather(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        x = self.x[indices]
        if generator is not None:
            x = x + 0.1 * torch.randn(x.shape, generator=generator)
        return x, self.y[indices]


class QuantizedHead(nn.Linear):
    """A linear layer with a 4-bit weight whose step is learned; its range is set by the first batch."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        plan = TensorPlan(bits=4, granularity="channel")
        self.quantizer = make_quantizer(plan, shape=(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantizer(self.weight), self.bias)


def tiny_model(dropout: float = 0.2, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(5)
    middle = nn.BatchNorm1d(16) if norm else nn.Identity()
    head = QuantizedHead(16, 2) if norm else nn.Linear(16, 2)
    return nn.Sequential(nn.Linear(6, 16), middle, nn.ReLU(), nn.Dropout(dropout), head)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def evaluate(model: nn.Module) -> dict[str, Any]:
    examples = Noisy()
    with torch.no_grad():
        logits = model(examples.x)
    return {"loss": F.cross_entropy(logits, examples.y), "confusion": [[1, 2], [3, 4]], "noise": random.random()}


class Jitter(Hook):
    """Uses all global generators and a state of its own: each must be restored for a resumed run to be equal."""

    def __init__(self, kill: Callable[[str, int], None]) -> None:
        self.total, self.kill = 0.0, kill

    def before_step(self, state: TrainState) -> None:
        self.kill("before_step", state.step)

    def after_backward(self, state: TrainState) -> None:
        self.kill("after_backward", state.step)
        self.total += random.random() + float(np.random.rand()) + float(torch.rand(()))
        for parameter in state.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 + 0.01 * self.total)
        state.logs["jitter"] = self.total

    def after_step(self, state: TrainState) -> None:
        self.kill("after_step", state.step)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: Any) -> None:
        self.total = state["total"]


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str | None, step: int) -> Callable[[str, int], None]:
    """Make the process kill itself at ``point`` once ``step`` steps are done; return the check for hooks to call."""
    now = 0

    def check(here: str, at: int) -> None:
        nonlocal now
        now = at
        if here == point and at >= step:
            die()

    write, replace, write_line = checkpoint._write, Path.replace, log.MetricsLog.write

    def half_a_checkpoint(file: Any, payload: bytes) -> None:
        if point == "half_a_checkpoint" and now >= step:
            write(file, payload[: len(payload) // 2])
            die()
        write(file, payload)

    def renamed(path: Path, target: Path) -> Path:
        if point == "before_rename" and now >= step:
            die()
        replace(path, target)
        if point == "after_rename" and now >= step:
            die()
        return Path(target)

    def half_a_line(self: Any, *args: Any) -> None:
        if point == "half_a_line" and now >= step:
            os.write(self._file.fileno(), b'{"step": 1, "ep')
            die()
        write_line(self, *args)

    checkpoint._write, Path.replace, log.MetricsLog.write = half_a_checkpoint, renamed, half_a_line  # type: ignore
    return check


POINTS = (
    "before_step", "after_backward", "after_step", "half_a_checkpoint", "before_rename", "after_rename", "half_a_line",
)  # fmt: skip


def train(out: Path, point: str | None = None, step: int = 0) -> None:
    """Train or go on training in ``out``; leave the final weights in ``weights.pt``, the plan in ``plan.json``."""
    torch.set_num_threads(1)
    check = arm(point, step)
    model = tiny_model()
    config = FitConfig(
        epochs=5, lr=0.05, accumulate=2, clip=5.0, warmup_steps=3, ema=0.9, log_every=3, checkpoint_every=4,
        accelerator="cpu", progress=False,
    )  # fmt: skip
    result = fit(
        model, Batches(Noisy(), 6), cross_entropy, config,
        evaluate=evaluate, out=out, hooks=[Jitter(check)], plan=PLAN, resume=True,
    )  # fmt: skip
    assert result.plan is not None
    result.plan.save(out / "plan.json")
    torch.save(model.state_dict(), out / "weights.pt")


def train_rank(rank: int, world: int, port: int, out: Path, kill_at: int | None) -> None:
    """Train as one of ``world`` processes, as torchrun would start it."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
            GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
        )  # fmt: skip
    check = arm(None if kill_at is None else "before_step", kill_at or 0)
    model = tiny_model(dropout=0.0, norm=False)
    config = FitConfig(
        max_steps=8, lr=0.05, accumulate=2, clip=1.0, log_every=1, checkpoint_every=3, accelerator="cpu", progress=False
    )
    batches = Batches(Quiet(), 12)
    fit(model, batches, cross_entropy, config, hooks=[Killable(check)], out=out, evaluate=quiet, resume=True)
    if rank == 0:
        torch.save(model.state_dict(), out / "weights.pt")


class Quiet(Noisy):
    """Without augmentation, whose random numbers differ by process."""

    def gather(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        return super().gather(indices, None)


class Killable(Hook):
    def __init__(self, check: Callable[[str, int], None]) -> None:
        self.check = check

    def before_step(self, state: TrainState) -> None:
        self.check("before_step", state.step)


def quiet(model: nn.Module) -> dict[str, float]:
    return {"loss": float(cross_entropy(model, Quiet().gather(torch.arange(96), None)))}


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__, "lightning_fabric", "torch.utils.tensorboard"])


def start(function: Callable[..., None], *args: Any) -> Any:
    """Start ``function`` in a process of its own."""
    process = _context.Process(target=function, args=args)
    process.start()
    return process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
