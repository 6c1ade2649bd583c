"""Random number generators of python, numpy and torch: seed, read, put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def mix(*numbers: int) -> int:
    """Return one seed, 0..2**63, from several non-negative numbers; near numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_all(*numbers: int) -> None:
    """Seed all global generators from several non-negative numbers."""
    seed = mix(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_state(device: torch.device | None = None) -> dict[str, Any]:
    """Return the state of all global generators, and that of a CUDA device, as plain data and tensors."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_state(state: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Undo ``get_state``."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


class Stream:
    """A stream of random numbers of its own: within ``with stream.active():`` the global generators follow it."""

    def __init__(self, *seed: int) -> None:
        with self._restored():
            seed_all(*seed)
            self._state = get_state()

    @staticmethod
    @contextlib.contextmanager
    def _restored() -> Iterator[None]:
        outside = get_state()
        try:
            yield
        finally:
            set_state(outside)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Use this stream; afterwards the global generators are as they were."""
        with self._restored():
            set_state(self._state)
            try:
                yield
            finally:
                self._state = get_state()
