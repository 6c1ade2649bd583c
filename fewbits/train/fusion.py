"""The hook that runs the control loop of balanced fusion nodes inside ``fit``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fewbits.errors import CheckpointError, TrainingError
from fewbits.layers.fusion import fusion_nodes
from fewbits.layers.fusion_control import freeze_fusion, fusion_numbers, update_fusion
from fewbits.train.hooks import Hook
from fewbits.train.state import TrainState


class BalanceFusion(Hook):
    """Moves the gains once an optimizer step, holds them for the end of the run, and logs each node's log ratio.

    freeze_at: share of the steps after which the gains stay, so that the weights settle for those that are deployed;
    energies are still measured and logged. fix, fix_at: called with the model before the step at that share, once in a
    run: ``fix_fusion`` of some batches, so that the weights also settle for constant norms; the gains stay from then
    on. The state of the nodes is in the model's. Raises TrainingError for a share outside 0..1, for one of fix and
    fix_at without the other, or for a model without nodes.
    """

    def __init__(
        self, freeze_at: float = 0.9, *, fix: Callable[[nn.Module], object] | None = None, fix_at: float | None = None
    ) -> None:
        for name, value in (("freeze_at", freeze_at), ("fix_at", 0 if fix_at is None else fix_at)):
            if not 0 <= value <= 1:
                raise TrainingError(f"{name} is a share of the steps, 0..1, got {value!r}")
        if (fix is None) != (fix_at is None):
            raise TrainingError("fix and fix_at need each other: give both or neither")
        self.freeze_at, self.fix, self.fix_at, self.fixed = freeze_at, fix, fix_at, False

    def state_dict(self) -> dict[str, Any]:
        """Return the shares, which a resumed run must have in common."""
        return {"freeze_at": self.freeze_at, "fix_at": self.fix_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError for other shares: the run would not be the one that was stopped."""
        for name, value in self.state_dict().items():
            if (saved := state.get(name, value)) != value:
                raise CheckpointError(f"the run was started with {name}={saved}, now it is {value}; give {saved}")

    def on_start(self, state: TrainState) -> None:
        """Check that there is something to control."""
        if not fusion_nodes(state.model):
            raise TrainingError("this model has no balanced fusion node: call balance_fusion first, or drop the hook")

    def before_step(self, state: TrainState) -> None:
        """Put constants in the place of norms when their time has come."""
        if self.fix is not None and not self.fixed and self._behind(self.fix_at, state):
            self.fix(state.model)
            self.fixed = True

    def _behind(self, share: float | None, state: TrainState) -> bool:
        return share is not None and state.step >= share * state.total_steps

    def after_backward(self, state: TrainState) -> None:
        """Update and log."""
        # a run before this one may have frozen them
        freeze_fusion(state.model, self._behind(self.freeze_at, state) or self._behind(self.fix_at, state))
        update_fusion(state.model)
        state.logs.update(fusion_numbers(state.model))
