"""Logging: ``metrics.jsonl``, TensorBoard, and the progress bar.

``metrics.jsonl`` holds no clock times: a run that was killed and resumed leaves the same bytes as one that was not.
Clock times are in the TensorBoard events.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fewbits.errors import CheckpointError


class MetricsLog:
    """One JSON line a logged step in ``folder/metrics.jsonl``, and the same numbers in ``folder/tensorboard``.

    resume_at: None to start anew, or (step, bytes) of the checkpoint: what was logged after it is cut off, since the
    resumed run logs it again. Raises CheckpointError where the file has lost what was logged before.
    """

    def __init__(self, folder: Path, resume_at: tuple[int, int] | None) -> None:
        from lightning_fabric.loggers import TensorBoardLogger

        step, size = resume_at or (-1, 0)
        path = folder / "metrics.jsonl"
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            raise CheckpointError(
                f"{path} has {found} bytes, but {size} were logged before the checkpoint of step {step}; restore the "
                "file, or start the run anew in another folder"
            )
        self._file = path.open("ab")
        self._file.truncate(size)
        self._size = size
        self._tensorboard = TensorBoardLogger(folder, name="tensorboard", version="", purge_step=step + 1)

    def write(self, where: Mapping[str, Any], numbers: Mapping[str, float], group: str | None = None) -> None:
        """Log ``numbers``; ``where`` says of which step, epoch and stage. Numbers that are not finite become null."""
        values = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line = {**where, **values} if group is None else {**where, group: values}
        payload = (json.dumps(line) + "\n").encode()
        self._file.write(payload)
        self._file.flush()
        self._size += len(payload)
        prefix = f"{where['stage']}/" if group is None else f"{group}/"
        self._tensorboard.log_metrics({prefix + n: v for n, v in numbers.items()}, where["step"])

    def sync(self) -> int:
        """Make the lines durable, and return their size in bytes."""
        os.fsync(self._file.fileno())
        return self._size

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._tensorboard.finalize("finished")


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return those metrics that are single numbers (also 0-d tensors and numpy's), as plain floats."""
    plain = {name: value.item() if _is_single(value) else value for name, value in metrics.items()}
    return {n: float(v) for n, v in plain.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def _is_single(value: Any) -> bool:
    return hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1


def progress_bar(enabled: bool) -> Progress:
    """Return a progress bar with elapsed and remaining time, and a field ``status``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        disable=not enabled,
    )
