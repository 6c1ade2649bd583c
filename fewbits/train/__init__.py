"""Training: one short loop on Lightning Fabric, resumable to the bit. A plain user loop works just as well."""

from __future__ import annotations

from fewbits.train.bits import LearnBits
from fewbits.train.checkpoint import Checkpoints
from fewbits.train.config import FitConfig
from fewbits.train.curriculum import Curriculum, Stage
from fewbits.train.data import Batches, BatchSource, Examples, LoaderBatches
from fewbits.train.ema import Ema
from fewbits.train.fairness import FairnessRamp
from fewbits.train.fusion import BalanceFusion
from fewbits.train.hooks import Hook
from fewbits.train.loop import FitResult, fit
from fewbits.train.optim import make_optimizer, make_schedule, parameter_groups
from fewbits.train.staging import Staged
from fewbits.train.state import TrainState

__all__ = [
    "BalanceFusion", "BatchSource", "Batches", "Checkpoints", "Curriculum", "Ema", "Examples", "FairnessRamp",
    "FitConfig", "FitResult", "Hook", "LearnBits", "LoaderBatches", "Stage", "Staged", "TrainState", "fit",
    "make_optimizer", "make_schedule", "parameter_groups",
]  # fmt: skip
