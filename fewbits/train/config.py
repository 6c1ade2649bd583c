"""What a training run is asked to do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from fewbits.errors import TrainingError

CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "schedule": ("cosine", "constant"),
    "precision": ("32-true", "bf16-mixed"),
    "accelerator": ("auto", "cpu", "cuda", "mps"),
}
AT_LEAST = {
    "epochs": 1, "max_steps": 1, "weight_decay": 0, "accumulate": 1, "warmup_steps": 0, "seed": 0, "log_every": 1,
    "checkpoint_every": 1, "keep": 1,
}  # fmt: skip
FREE = ("checkpoint_every", "keep", "progress")  # do not change what a run computes, so a resumed run may change them


@dataclass(frozen=True)
class FitConfig:
    """How to train. Give either ``epochs`` or ``max_steps``; a step is one update of the weights.

    lr, weight_decay: of the weights; quantizer_lr: of quantizers' parameters, as a share of lr; decay_all: biases and
    norms decay, too (``parameter_groups``). optimizer: "sgd" (momentum 0.9) or
    "adamw". accumulate: batches a step. clip: largest L2 norm of the gradient, None: not clipped. schedule: "cosine"
    (to 0 at the last step) or "constant", behind ``warmup_steps`` steps of linear warm-up. ema: decay of an
    exponential moving average of the weights, which is then what is evaluated and what ``fit`` leaves in the model;
    None: no average. precision: "32-true" or "bf16-mixed". devices: processes on this machine; "auto": one, or as
    many as ``torchrun`` started. log_every, checkpoint_every: in steps (the last step is always logged and saved).
    keep: checkpoints that stay. Raises TrainingError for a value out of range.
    """

    epochs: int | None = None
    max_steps: int | None = None
    lr: float = 0.01
    weight_decay: float = 1e-4
    quantizer_lr: float = 1.0
    decay_all: bool = True
    optimizer: Literal["sgd", "adamw"] = "sgd"
    accumulate: int = 1
    clip: float | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 0
    ema: float | None = None
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int | Literal["auto"] = "auto"
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2
    progress: bool = True

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.max_steps is None):
            raise TrainingError(f"epochs={self.epochs} and max_steps={self.max_steps}: give exactly one of the two")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise TrainingError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise TrainingError(f"{name} must be at least {least}, got {value!r}")
        for name in ("lr", "quantizer_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise TrainingError(f"{name} must be above 0 and finite, got {getattr(self, name)!r}")
        if self.clip is not None and not self.clip > 0:
            raise TrainingError(f"clip must be above 0 (None: no clipping), got {self.clip!r}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise TrainingError(f"ema is a decay above 0 and below 1 (None: no moving average), got {self.ema!r}")
        if self.devices != "auto" and self.devices < 1:
            raise TrainingError(f"devices must be 'auto' or at least 1, got {self.devices!r}")

    def identity(self) -> dict[str, Any]:
        """Return the fields that a resumed run must share with the run that it continues."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in FREE}

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of steps of the run."""
        return self.max_steps if self.epochs is None else self.epochs * steps_per_epoch  # type: ignore[return-value]
