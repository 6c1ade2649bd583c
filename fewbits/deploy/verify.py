"""Verify an exported file: run it in ONNX Runtime on real data and hold it against the packed model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewbits.errors import ExportError
from fewbits.layers import call

TIMED_RUNS = 15
Agreement = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class VerifyReport:
    """What was seen: agreement in percent of samples, largest difference of outputs, milliseconds for one sample."""

    samples: int
    top1_agreement: float
    max_abs_diff: float
    median_abs_diff: float
    file_bytes: int
    latency_ms: float
    float_latency_ms: float | None
    engine: str
    notes: list[str] = field(default_factory=list)


def verify(
    path: str | Path,
    packed: nn.Module,
    batches: Iterable[Any],
    *,
    float_onnx: str | Path | None = None,
    threads: int = 1,
    min_agreement: float = 99.0,
    agreement: Agreement | None = None,
) -> VerifyReport:
    """Run an ONNX file beside the packed model on batches of inputs and compare the answers.

    agreement: (outputs of the file, of the packed model) for one batch -> bool, one a sample; None: the argmax over
    axis 1 of the first output (class scores [N, C, ...]), or, for outputs of one axis, the values to 1e-3. With
    float_onnx the latencies of both are taken alternately, for one sample, on ``threads`` threads. Raises ExportError
    if the file does not load or run, if an output is not finite where the packed model's is, or if less than
    min_agreement percent of the samples agree.
    """
    run = open_session(path, threads)
    seen, agreeing, differences, first = 0, 0, [], None
    for batch in batches:
        args = _arguments(batch)
        first = first if first is not None else args
        with torch.no_grad():
            want = _first_output(call(packed, batch)).float().numpy()
        got = run(args)
        if got.shape != want.shape:
            raise ExportError(f"{path}: output shape {got.shape}, the packed model gives {want.shape}")
        if not np.array_equal(np.isfinite(got), np.isfinite(want)):
            raise ExportError(f"{path}: its outputs are NaN or Inf where those of the packed model are not")
        same = (agreement or _agreement)(torch.from_numpy(got), torch.from_numpy(want))
        seen, agreeing = seen + len(same), agreeing + int(same.sum())
        differences.append(np.abs(got - want).reshape(len(want), -1).max(1))
    if first is None:
        raise ExportError("verify needs at least one batch, got none")
    share = 100.0 * agreeing / seen
    if share < min_agreement:
        raise ExportError(
            f"{path} failed verification: its answers agree with the packed model on {share:.2f} % of {seen} "
            f"samples, at least {min_agreement:g} % are required; largest difference {max(map(max, differences)):.3g}"
        )
    latency, float_latency = latencies(run, float_onnx, tuple(a[:1] for a in first), threads)
    largest = np.concatenate(differences)
    return VerifyReport(
        samples=seen,
        top1_agreement=share,
        max_abs_diff=float(largest.max()),
        median_abs_diff=float(np.median(largest)),
        file_bytes=Path(path).stat().st_size,
        latency_ms=latency,
        float_latency_ms=float_latency,
        engine=engine_name(),
        notes=_notes(latency, float_latency),
    )


def open_session(path: str | Path, threads: int = 1) -> Callable[[Sequence[Tensor]], np.ndarray[Any, Any]]:
    """Open an ONNX file in ONNX Runtime; return a function from input tensors to the first output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a dozen classes of its own
        raise ExportError(f"ONNX Runtime cannot load {str(path)!r}: {str(error).splitlines()[0]}") from error
    names = [i.name for i in session.get_inputs()]

    def run(args: Sequence[Tensor]) -> np.ndarray[Any, Any]:
        try:
            output: np.ndarray[Any, Any] = session.run(None, dict(zip(names, (a.numpy() for a in args))))[0]
        except Exception as error:
            raise ExportError(f"ONNX Runtime cannot run {str(path)!r}: {str(error).splitlines()[0]}") from error
        return output

    return run


def engine_name() -> str:
    """Return the name and version of the runtime that verifies."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def latencies(
    run: Callable[[Sequence[Tensor]], Any],
    float_onnx: str | Path | None,
    sample: Sequence[Tensor],
    threads: int,
) -> tuple[float, float | None]:
    """Return the median milliseconds of one sample, and of the float model, taken in turn."""
    runs = [run] if float_onnx is None else [run, open_session(float_onnx, threads)]
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(TIMED_RUNS + 3):
        for one, taken in zip(runs, times):
            start = time.perf_counter()
            one(sample)
            if turn >= 3:
                taken.append((time.perf_counter() - start) * 1e3)
    medians = [statistics.median(taken) for taken in times]
    return medians[0], medians[1] if len(medians) > 1 else None


def _notes(latency: float, float_latency: float | None) -> list[str]:
    if float_latency is not None and latency > float_latency:
        ratio = latency / float_latency
        return [f"this encoding runs slower than float here ({ratio:.2f}x the time): smaller, not faster"]
    return []


def _agreement(got: Tensor, want: Tensor) -> Tensor:
    """Tell for each sample whether the answers agree."""
    if want.ndim == 1:
        return torch.isclose(got, want, atol=1e-3)
    same = (got.argmax(1) == want.argmax(1)).reshape(len(want), -1)
    return same.float().mean(1) > 0.999


def _arguments(batch: Any) -> tuple[Tensor, ...]:
    if isinstance(batch, Tensor):
        return (batch,)
    return tuple(batch.values()) if hasattr(batch, "values") else tuple(batch)


def _first_output(output: Any) -> Tensor:
    """Return the tensor that the first ONNX output holds."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if hasattr(output, "values") else output[0]
    return output
