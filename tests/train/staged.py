"""A small quantized classifier in two functional modules, its data, and a curriculum."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.allocate import uniform_plan
from fewbits.layers import calibrate, quantize
from fewbits.train import Batches, Curriculum, FitConfig, Stage, Staged, fit


class Blobs:
    """Images 2 x 6 x 6 of three classes, each with a place of its own."""

    def __init__(self, count: int = 72) -> None:
        generator = torch.Generator().manual_seed(3)
        self.y = torch.arange(count) % 3
        self.x = 0.5 * torch.randn(count, 2, 6, 6, generator=generator)
        for i, label in enumerate(self.y.tolist()):
            self.x[i, :, 2 * label : 2 * label + 2] += 1.0

    def __len__(self) -> int:
        return len(self.y)

    def gather(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        return self.x[indices], self.y[indices]


class Net(nn.Module):
    """A backbone that returns two levels, and a head on the second."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d((3, 1)),
            nn.Flatten(), nn.Dropout(0.1), nn.Linear(24, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(x)[-1])
        return logits


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(x)
        return first, self.second(first)


TWO = Curriculum([Stage(["backbone"], 1 / 3), Stage(["head"], 2 / 3)])


def float_net() -> Net:
    torch.manual_seed(7)
    return Net()


def quantized(net: Net | None = None, bits: int = 4) -> Net:
    """Return the quantized copy of a net, not calibrated."""
    model = copy.deepcopy(net or float_net())
    quantize(model, uniform_plan(model, bits, bits, first_last=None), verbose=False)
    return model


def calibrated(net: Net) -> Net:
    model = quantized(net)
    calibrate(model, calibration())
    return model


def batches(size: int = 8) -> Batches:
    return Batches(Blobs(), size, seed=1)


def calibration() -> list[Tensor]:
    return [Blobs().x[:24], Blobs().x[24:48]]


def staged(curriculum: Curriculum = TWO, loss: Any = None) -> Staged:
    return Staged(curriculum, calibration(), loss)


def config(**changes: Any) -> FitConfig:
    given = {"epochs": 1, "lr": 0.02, "accelerator": "cpu", "progress": False, "log_every": 1}
    return FitConfig(**(given | changes))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train_rank(rank: int, world: int, port: int, out: Path) -> None:
    """Train in two stages as one of ``world`` processes, as torchrun would start it; leave the weights of each."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
            GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
        )  # fmt: skip
    model = quantized()
    model.head[5].p = 0.0  # random numbers differ by process, as do the statistics of its share of a batch
    curriculum = dataclasses.replace(TWO, norms="frozen")
    fit(model, batches(), cross_entropy, config(clip=1.0), stages=staged(curriculum))
    torch.save(model.state_dict(), out / f"{rank}_of_{world}.pt")
