from __future__ import annotations

from typing import Any

import pytest

from fewbits.errors import FewbitsError, TrainingError
from fewbits.train import FitConfig


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "exactly one"),
        ({"epochs": 1, "max_steps": 2}, "epochs=1 and max_steps=2"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": 1, "lr": 0.0}, "lr must be above 0"),
        ({"epochs": 1, "lr": float("nan")}, "lr must be above 0 and finite, got nan"),
        ({"epochs": 1, "optimizer": "adam"}, r"optimizer must be one of \('sgd', 'adamw'\), got 'adam'"),
        ({"epochs": 1, "schedule": "step"}, "schedule must be one of"),
        ({"epochs": 1, "precision": "fp8"}, "precision must be one of"),
        ({"epochs": 1, "accelerator": "tpu"}, "accelerator must be one of"),
        ({"epochs": 1, "accumulate": 0}, "accumulate must be at least 1"),
        ({"epochs": 1, "clip": 0.0}, "clip must be above 0"),
        ({"epochs": 1, "ema": 1.0}, "ema is a decay"),
        ({"epochs": 1, "keep": 0}, "keep must be at least 1"),
        ({"epochs": 1, "devices": 0}, "devices must be 'auto' or at least 1"),
        ({"epochs": 1, "weight_decay": float("nan")}, "weight_decay must be at least 0, got nan"),
    ],
)
def test_values_out_of_range_are_named(given: dict[str, Any], told: str) -> None:
    with pytest.raises(TrainingError, match=told):
        FitConfig(**given)
    assert issubclass(TrainingError, FewbitsError)


def test_total_steps_and_identity() -> None:
    assert FitConfig(epochs=3).total_steps(7) == 21
    assert FitConfig(max_steps=5).total_steps(7) == 5
    one = FitConfig(epochs=3, keep=1, progress=False, checkpoint_every=9)
    assert one.identity() == FitConfig(epochs=3).identity()
    assert one.identity() != FitConfig(epochs=3, lr=0.5).identity()
