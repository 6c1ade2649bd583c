"""Checkpoints that are whole or not there.

A checkpoint is a plain ``torch.save`` file whose name carries step and checksum: ``step_00000500_<16 hex digits>.pt``.
It is written beside its place, synced, read back and then renamed, so that a kill at any moment leaves the older ones
as they are. One that was damaged later is told by its checksum, is set aside, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fewbits.errors import CheckpointError

NAME = re.compile(r"step_(\d{8,})_([0-9a-f]{16})\.pt")


class Checkpoints:
    """The checkpoints in ``folder``, of which the last ``keep`` stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write ``state`` and return its file; older ones beyond ``keep`` are removed after it is safe on disk.

        Raises CheckpointError where it cannot be written; those that are there then stay.
        """
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        payload = buffer.getvalue()
        path = self.folder / f"step_{step:08d}_{_digest(payload)}.pt"
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                _write(file, payload)
            _require_whole(temporary, path.name)
            temporary.replace(path)
            _sync_folder(self.folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise CheckpointError(
                f"cannot write {path}: {error}; free some space or choose another folder, then resume"
            ) from error
        self._remove_old(path)
        return path

    def paths(self) -> list[Path]:
        """Return all checkpoints, newest first, damaged or not."""
        found = [p for p in self.folder.iterdir() if NAME.fullmatch(p.name)] if self.folder.is_dir() else []
        return sorted(found, key=_age, reverse=True)

    def last_good(self) -> Path | None:
        """Return the newest checkpoint that is whole, or None where there are none at all.

        Damaged ones that are newer are set aside, with a warning. Raises CheckpointError where all are damaged.
        """
        damaged: list[tuple[Path, CheckpointError]] = []
        for path in self.paths():
            try:
                _require_whole(path, path.name)
            except CheckpointError as error:
                damaged.append((path, error))
                continue
            for bad, reason in damaged:
                aside = bad.replace(bad.with_suffix(".damaged"))
                warnings.warn(f"{reason}; kept as {aside.name}, going back to {path.name}", stacklevel=2)
            return path
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole ({damaged[0][1]}); start the run anew in another folder"
            )
        return None

    @staticmethod
    def read(path: Path) -> dict[str, Any]:
        """Return the state in a checkpoint, on the CPU. Raises CheckpointError where it is damaged."""
        payload = _require_whole(path, path.name)
        state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        return state

    def _remove_old(self, newest: Path) -> None:
        others = [p for p in self.paths() if p != newest]
        for path in (*others[self.keep - 1 :], *self.folder.glob("*.tmp")):
            path.unlink(missing_ok=True)


def prepare_folder(folder: Path) -> None:
    """Make sure that files can be written in ``folder``. Raises CheckpointError if not."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"cannot write in {folder}: {error}; choose another output folder") from error


def _age(path: Path) -> tuple[int, int]:
    return int(path.name.split("_")[1]), path.stat().st_mtime_ns


def _digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()[:16]


def _require_whole(path: Path, name: str) -> bytes:
    """Return the content of ``path`` if it has the checksum that ``name`` tells. Raises CheckpointError if not."""
    match = NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(
            f"{path} is not named as a checkpoint, step_<number>_<checksum>.pt: its content is unproven"
        )
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    if _digest(payload) != match[2]:
        raise CheckpointError(
            f"checkpoint {path} is damaged: its {len(payload)} bytes have checksum {_digest(payload)}, not {match[2]}"
        )
    return payload


def _write(file: BinaryIO, payload: bytes) -> None:
    file.write(payload)
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; where folders cannot be opened (Windows) there is nothing to do."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
