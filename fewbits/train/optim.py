"""Optimizer, parameter groups and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fewbits.errors import TrainingError
from fewbits.train.config import FitConfig

OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {"momentum": 0.9}),
    "adamw": (AdamW, {}),
}


def quantizers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over name and module of all quantizers: modules whose class has ``is_quantizer = True``."""
    return ((name, m) for name, m in model.named_modules() if getattr(type(m), "is_quantizer", False))


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, *, quantizer_lr: float = 1.0, decay_all: bool = True
) -> list[dict[str, Any]]:
    """Return parameter groups for any torch optimizer: the quantizers' parameters apart, without weight decay.

    quantizer_lr and a quantizer's own ``lr_scale`` (default 1.0) multiply ``lr``; each scale has a group. All other
    parameters, norms and biases too, are in the first group with ``lr`` and ``weight_decay``, as in a plain recipe;
    decay_all False: those of one axis or none have a group without decay. What does not require grad is left out.
    """
    scales: dict[nn.Parameter, float] = {}
    for _, quantizer in quantizers(model):
        scale = quantizer_lr * float(getattr(quantizer, "lr_scale", 1.0))
        scales.update((p, scale) for p in quantizer.parameters() if p not in scales)
    plain = [p for p in model.parameters() if p not in scales]
    decaying = [p for p in plain if decay_all or p.ndim > 1]
    groups: list[dict[str, Any]] = [{"name": "weights", "params": decaying, "lr": lr, "weight_decay": weight_decay}]
    if not decay_all:
        rest = [p for p in plain if p.ndim <= 1]
        groups.append({"name": "norms and biases", "params": rest, "lr": lr, "weight_decay": 0.0})
    for scale in sorted(set(scales.values())):
        members = [p for p in scales if scales[p] == scale]
        groups.append({"name": f"quantizers x{scale:g}", "params": members, "lr": lr * scale, "weight_decay": 0.0})
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: FitConfig) -> Optimizer:
    """Return the optimizer that ``config`` asks for, over ``parameter_groups``.

    Raises TrainingError where no parameter requires grad.
    """
    cls, options = OPTIMIZERS[config.optimizer]
    groups = parameter_groups(
        model, config.lr, config.weight_decay, quantizer_lr=config.quantizer_lr, decay_all=config.decay_all
    )
    if not groups:
        raise TrainingError("nothing can be trained: no parameter of the model requires grad; unfreeze some")
    return cls(groups, lr=config.lr, **options)  # type: ignore[call-arg]


def make_schedule(optimizer: Optimizer, config: FitConfig, total_steps: int) -> LambdaLR:
    """Return the schedule: linear warm-up, then half a cosine to 0 at ``total_steps``, or constant."""
    warmup = config.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.schedule == "constant":
            return 1.0
        done = (step - warmup) / max(1, total_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return LambdaLR(optimizer, factor)
