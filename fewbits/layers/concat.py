"""Where branches of a network meet, as a module: so that the place has a name and its branches have names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewbits.errors import PlanError, QuantizationError


class Concat(nn.Module):
    """Puts tensors [B, C_i, ...] beside each other along the channels: [B, sum C_i, ...]; it has no parameters.

    branches: their names, in order. Raises PlanError for fewer than two branches or for one name twice.
    """

    def __init__(self, branches: Sequence[str]) -> None:
        super().__init__()
        self.branches = tuple(branches)
        if len(self.branches) < 2 or len(set(self.branches)) < len(self.branches):
            raise PlanError(f"a concat needs two branches or more, each with a name of its own, got {self.branches}")

    def forward(self, *branches: Tensor) -> Tensor:
        """Return the branches as one tensor. Raises QuantizationError for another count or sizes that differ."""
        if len(branches) != len(self.branches):
            raise QuantizationError(f"a concat of {self.branches} got {len(branches)} tensors; give one a branch")
        if any(x.shape[2:] != branches[0].shape[2:] for x in branches):  # no set: exporters have symbols for sizes
            shapes = {name: list(x.shape) for name, x in zip(self.branches, branches)}
            raise QuantizationError(f"branches {shapes} must agree in all axes but the channels; resize them before")
        return torch.cat(branches, 1)

    def extra_repr(self) -> str:
        """Show the branches in ``print(model)``."""
        return ", ".join(self.branches)
