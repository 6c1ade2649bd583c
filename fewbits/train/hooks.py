"""Hooks: the place where methods plug into the loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewbits.train.state import TrainState


class Hook:
    """Does nothing; override what is needed.

    Order: on_start and on_stage_change at the start of every run, also of a resumed one, whose checkpoint is loaded
    over what they did; then each step before_step, after_backward, after_step; on_stage_change again at the start of
    each further stage of a curriculum. Hooks are called in the order they were given, on every process. A number put
    into ``state.logs`` is logged if its step is a logged one.
    """

    def on_start(self, state: TrainState) -> None:
        """Model and optimizer are set up; nothing has run."""

    def on_stage_change(self, state: TrainState, stage: str) -> None:
        """A stage begins: the run, by its name, or a stage of its curriculum, by the modules that it adds."""

    def before_step(self, state: TrainState) -> None:
        """Before the batches of step ``state.step`` are read."""

    def after_backward(self, state: TrainState) -> None:
        """The gradients of the step are complete, not clipped; ``state.loss`` is its loss."""

    def after_step(self, state: TrainState) -> None:
        """The weights, the learning rate and the average are updated; the gradients are still there."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the hook needs to go on: tensors and plain data, equal on every process."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo ``state_dict``."""
