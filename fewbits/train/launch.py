"""Devices and processes: from a configuration to a launched Fabric."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from fewbits.errors import QuantizationError, TrainingError
from fewbits.train.config import FitConfig
from fewbits.train.optim import quantizers


def launch(config: FitConfig) -> Any:
    """Return a launched Fabric: one process, or DDP over those that ``torchrun`` started.

    Raises TrainingError where the processes or the accelerator are not those asked for.
    """
    from lightning_fabric import Fabric

    local, world = _processes()
    if config.devices not in ("auto", local):
        raise TrainingError(
            f"devices={config.devices}, but {local} process(es) run on this machine; start the script with "
            f"'torchrun --nproc-per-node={config.devices} ...', or use devices='auto'"
        )
    if config.accelerator == "cuda" and not torch.cuda.is_available():
        raise TrainingError("accelerator='cuda', but torch finds no CUDA device; use 'auto' or 'cpu'")
    if config.accelerator == "mps" and not torch.backends.mps.is_available():
        raise TrainingError("accelerator='mps', but torch finds no MPS device; use 'auto' or 'cpu'")
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=local,
        num_nodes=world // local,
        strategy="ddp" if world > 1 else "auto",
        precision=config.precision,
    )
    fabric.launch()
    return fabric


def _processes() -> tuple[int, int]:
    """Return the number of processes on this machine and on all, as torchrun tells them to its children."""
    if not (torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()):
        return 1, 1
    return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])


def require_calibrated(model: nn.Module, world: int) -> None:
    """Raise QuantizationError if several processes would each set the range of a quantizer from their own data."""
    open_ = [n for n, q in quantizers(model) if not (getattr(q, "calibrated", True) or getattr(q, "dynamic", False))]
    if world > 1 and open_:
        raise QuantizationError(
            f"{len(open_)} quantizers have no range yet, the first is {open_[0]!r}; each of the {world} processes "
            "would set another one: run fewbits.calibrate(model, batches), with the same batches on each, before fit"
        )
