"""Fair timing and memory of training steps: interleaved, in one process, against a reference arm."""

from __future__ import annotations

import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        low, median, high = statistics.quantiles(list(values), n=4, method="inclusive")
        return cls(low, median, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def interleave(
    steps: dict[str, Step], rounds: int, warmup: int, clock: str = "wall", seed: int = 0
) -> dict[str, list[float]]:
    """Run one step of every arm in each round, in an order shuffled anew; return seconds per round.

    Whatever slows the machine down for a while then slows all arms, and the ratio within a round stands. clock:
    ``cpu`` counts the time that this process computes, on all its threads, and suits a machine shared with others.
    """
    now = CLOCKS[clock]
    for step in steps.values():
        for _ in range(warmup):
            step()
    order, shuffle = list(steps), random.Random(seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            start = now()
            steps[name]()
            seconds[name].append(now() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], name: str, reference: str) -> Spread:
    """Return the spread over rounds of the time of ``name`` over that of ``reference`` in the same round."""
    return Spread.of(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


@dataclass(frozen=True)
class TensorMemory:
    """Bytes of tensors. kept: alive between forward and backward; peak: the most alive at any time of a step."""

    kept: int
    peak: int


def tensor_memory(forward: Callable[[], Tensor], step: Step) -> TensorMemory:
    """Count what the allocator hands out and gets back, above what lived before (parameters, the batch).

    Counting at the allocator sees every way to keep a tensor for backward: hooks on saved tensors miss what sits
    in attributes, behind other hooks, or in compiled code. Run a step before, so that lasting buffers exist.
    """
    changes, loss = _allocations(forward)
    kept = sum(changes)
    loss.backward()
    return TensorMemory(kept, max(itertools.accumulate(_allocations(step)[0])))


def _allocations(call: Callable[[], Any]) -> tuple[list[int], Any]:
    """Return the bytes of each allocation (above 0) and release (below 0) of a call, in order, and its result."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler talks; it has no other switch
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        result = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())], result


def peak_rss(step: Step) -> int:
    """Return by how many bytes the resident memory of this process rises during one step, at its peak (Linux).

    Meant for a fresh process: memory that an earlier step freed but the allocator kept would hide the rise.
    """
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark VmHWM
    before = _status_kib(status, "VmRSS")
    step()
    return (_status_kib(status, "VmHWM") - before) * 1024


def _status_kib(status: Path, key: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])
