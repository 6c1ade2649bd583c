"""Exponential moving average of the parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    """An average of the floating-point parameters of ``model``, with ``decay`` a step; buffers are not averaged.

    It starts with the parameters as they are after the first step: a quantizer may set its range during that step.
    ``renew`` has some of them start anew.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
        self._average: dict[str, Tensor] = {}
        self._update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present parameters."""
        if self._average:
            self._update(list(self._average.values()), [self._parameters[n] for n in self._average], 0)
        missing = {n: p for n, p in self._parameters.items() if n not in self._average}
        self._average |= {n: p.detach().clone() for n, p in missing.items()}

    def renew(self, names: Iterable[str]) -> None:
        """Forget the average of these parameters: what they were has no meaning any more."""
        for name in names:
            self._average.pop(name, None)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Overwrite the parameters with the average; before the first step there is none, and nothing changes."""
        for name, average in self._average.items():
            self._parameters[name].copy_(average)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model has the average as its parameters."""
        kept = {n: p.detach().clone() for n, p in self._parameters.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    self._parameters[name].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by parameter name."""
        return dict(self._average)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Undo ``state_dict``."""
        self._average = {n: v.to(self._parameters[n].device, copy=True) for n, v in state.items()}
