"""The hook that runs the control loop of balanced fusion nodes inside ``fit``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewbits.errors import CheckpointError, TrainingError
from fewbits.layers.fusion import fusion_nodes
from fewbits.layers.fusion_control import freeze_fusion, fusion_numbers, update_fusion
from fewbits.train.hooks import Hook
from fewbits.train.state import TrainState


class BalanceFusion(Hook):
    """Moves the gains once an optimizer step, holds them for the end of the run, and logs each node's log ratio.

    freeze_at: share of the steps after which the gains stay, so that the weights settle for those that are deployed;
    energies are still measured and logged. The state of the nodes is in the model's. Raises TrainingError for a share
    outside 0..1, or for a model without nodes.
    """

    def __init__(self, freeze_at: float = 0.9) -> None:
        if not 0 <= freeze_at <= 1:
            raise TrainingError(f"freeze_at is a share of the steps, 0..1, got {freeze_at!r}")
        self.freeze_at = freeze_at

    def state_dict(self) -> dict[str, Any]:
        """Return the share, which a resumed run must have in common."""
        return {"freeze_at": self.freeze_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError for another share: the run would not be the one that was stopped."""
        if (saved := state.get("freeze_at", self.freeze_at)) != self.freeze_at:
            raise CheckpointError(
                f"the run was started with freeze_at={saved}, now it is {self.freeze_at}; give {saved}"
            )

    def on_start(self, state: TrainState) -> None:
        """Check that there is something to control."""
        if not fusion_nodes(state.model):
            raise TrainingError("this model has no balanced fusion node: call balance_fusion first, or drop the hook")

    def after_backward(self, state: TrainState) -> None:
        """Update and log."""
        freeze_fusion(state.model, state.step >= self.freeze_at * state.total_steps)  # a run before this one froze them
        update_fusion(state.model)
        state.logs.update(fusion_numbers(state.model))
