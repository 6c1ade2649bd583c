"""The state of a search: everything it needs to go on, and the folder that holds it."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewbits.allocate.subject import Snapshot
from fewbits.errors import CheckpointError

FORMAT = 1
STATE, LOG = "search.pt", "search.json"


@dataclass
class Mark:
    """One point of a search: bits, what was measured there, and the weights."""

    bits: list[int]
    accuracy: float
    costs: dict[str, float]
    weights: Snapshot


@dataclass
class SearchState:
    """given: what a resumed search must have in common with this one. phase: "reference", "cluster" or "refine".
    rounds, steps: done, of phase 1 and 2. now, reference, stable: see ``Mark``. best: least distance so far.
    bad: steps in a row that came no nearer. seen: bits that were tried. log: one entry a step.
    """

    given: dict[str, Any]
    phase: str = "reference"
    rounds: int = 0
    steps: int = 0
    penalty: float = 0.0
    accuracies: dict[str, float] = field(default_factory=dict)
    reference: Mark | None = None
    now: Mark | None = None
    stable: Mark | None = None
    best: float = float("inf")
    bad: int = 0
    seen: list[list[int]] = field(default_factory=list)
    status: str | None = None
    log: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return tensors and plain data."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("reference", "now", "stable"):
            mark = data[name]
            data[name] = None if mark is None else dict(vars(mark))
        return {"format": FORMAT, **data}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> SearchState:
        """Undo ``to_dict``."""
        data = {name: value for name, value in data.items() if name != "format"}
        for name in ("reference", "now", "stable"):
            data[name] = None if data[name] is None else Mark(**data[name])
        return SearchState(**data)


class SearchFolder:
    """Where the state of a search lies: ``search.pt`` to go on from, ``search.json`` with its log to read. A path of
    None keeps nothing.
    """

    def __init__(self, path: Path | str | None) -> None:
        self.path = None if path is None else Path(path)

    def load(self, given: dict[str, Any]) -> SearchState | None:
        """Return the state that was saved, or None.

        Raises CheckpointError where it cannot be read, or was saved by a search with other arguments.
        """
        if self.path is None or not (self.path / STATE).is_file():
            return None
        file = self.path / STATE
        try:
            data = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a dozen classes here
            raise CheckpointError(
                f"{file} cannot be read: {str(error).splitlines()[0]:.120}; delete it to search anew"
            ) from error
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT:
            raise CheckpointError(f"{file} has format {found!r}, expected {FORMAT}; delete it to search anew")
        try:
            state = SearchState.from_dict(data)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is no state of a search ({error}); delete it to search anew") from error
        differ = [k for k in {**state.given, **given} if state.given.get(k) != given.get(k)]
        if differ:
            told = "; ".join(f"{k} was {state.given.get(k)!r:.200}, now {given.get(k)!r:.200}" for k in differ[:3])
            raise CheckpointError(
                f"{file} was written by another search: {told}. Go on with the same arguments, or choose another folder"
            )
        return state

    def require_writable(self, state: SearchState) -> None:
        """Write the log alone: what ``save`` would raise is told before any work."""
        self._write({LOG: _told(state)})

    def save(self, state: SearchState) -> None:
        """Write the state, whole or not at all. Raises CheckpointError where it cannot be written."""
        if self.path is None:
            return
        buffer = io.BytesIO()
        torch.save(state.to_dict(), buffer)
        self._write({STATE: buffer.getvalue(), LOG: _told(state)})

    def _write(self, files: dict[str, bytes]) -> None:
        if self.path is None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name, payload in files.items():
                _put(self.path / name, payload)
        except OSError as error:
            raise CheckpointError(
                f"cannot write the state of the search to {self.path}: {error}; free some space or choose another "
                "folder, then search again"
            ) from error


def _told(state: SearchState) -> bytes:
    told = {"phase": state.phase, "status": state.status, "accuracies": state.accuracies, "steps": state.log}
    return (json.dumps(told, indent=1) + "\n").encode()


def seed_step(seed: int, step: int) -> None:
    """Seed all global generators for one step, so that a step is the same whether the search was stopped before it."""
    mixed = int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> np.uint64(1))
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.manual_seed(mixed)


def _put(path: Path, payload: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
