"""The hook that brings a fairness term in slowly, and keeps its state with the run's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fewbits.errors import TrainingError
from fewbits.losses import GroupFairness
from fewbits.train.hooks import Hook

if TYPE_CHECKING:
    from fewbits.train.state import TrainState


class FairnessRamp(Hook):
    """Raises the weight of a ``GroupFairness`` from 0 to its own over the share ``over`` of the steps."""

    def __init__(self, fairness: GroupFairness, over: float = 0.1) -> None:
        if not 0 <= over <= 1:
            raise TrainingError(f"over is a share of the steps, 0..1, got {over!r}")
        self.fairness, self.over = fairness, over

    def before_step(self, state: TrainState) -> None:
        """Set the ramp for this step."""
        rising = self.over * state.total_steps
        self.fairness.ramp = 1.0 if rising == 0 else min(1.0, (state.step + 1) / rising)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the term."""
        return self.fairness.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo ``state_dict``."""
        self.fairness.load_state_dict(state)
