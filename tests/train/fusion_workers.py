"""Training with balanced fusion, in this process or as one of several."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbits as fb
from fewbits.deploy import fix_fusion
from fewbits.layers import balance_fusion, fusion_nodes
from fewbits.plan import LayerPlan, Plan, TensorPlan
from fewbits.train import BalanceFusion, Batches, FitConfig, Hook, TrainState, fit


class Scenes:
    """Noise images with the sign of a local mean to predict."""

    def __init__(self) -> None:
        self.x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(2))
        self.y = (F.avg_pool2d(self.x.mean(1, keepdim=True), 3, 1, 1) > 0).float()

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        return self.x[indices], self.y[indices]


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shallow = nn.Conv2d(3, 4, 3, padding=1)
        self.deep = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
        self.head = nn.Conv2d(10, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        up = F.interpolate(self.deep(x), scale_factor=2)
        out: Tensor = self.head(torch.cat([up, self.shallow(x)], 1))
        return out


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])


class StopAt(Hook):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def before_step(self, state: TrainState) -> None:
        if state.step == self.step:
            raise KeyboardInterrupt


def train(
    out: Path | None,
    stop_at: int | None = None,
    resume: bool = False,
    batch: int = 8,
    freeze_at: float = 0.9,
    fix_at: float | None = None,
    hooks: Sequence[Hook] = (),
) -> nn.Module:
    """Train twenty steps of two batches each; return the model. fix_at: at 4 bits, with constants from there on."""
    torch.manual_seed(5)
    model, fix = Fused(), None
    balance_fusion(model, torch.zeros(1, 3, 8, 8))
    if fix_at is not None:
        four = LayerPlan(TensorPlan(4, granularity="channel"), TensorPlan(4, "lsq"))
        fb.calibrate(fb.quantize(model, Plan((("*", four),)), verbose=False), [Scenes().x])
        fix = functools.partial(fix_fusion, batches=[Scenes().x])
    config = FitConfig(
        max_steps=20, lr=0.05, accumulate=2, log_every=1, checkpoint_every=3, accelerator="cpu", progress=False
    )
    every = [BalanceFusion(freeze_at, fix=fix, fix_at=fix_at), StopAt(stop_at), *hooks]
    fit(model, Batches(Scenes(), batch), loss, config, out=out, hooks=every, resume=resume)
    return model


def train_rank(rank: int, world: int, port: int, out: Path) -> None:
    """Train as one of ``world`` processes, as torchrun would start it; leave the gains in ``rank.pt``."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    (node,) = fusion_nodes(train(None)).values()
    torch.save(node.lam, out / f"{rank}.pt")
