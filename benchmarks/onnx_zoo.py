"""ONNX files of quantized models held against the packed models, over architectures of three libraries.

    python -m benchmarks.onnx_zoo > docs/results/onnx_zoo.md

Each model of tests/zoo.py, on random weights and inputs, is quantized, calibrated, packed, exported and run in ONNX
Runtime beside the packed model. W8A8 is exported in mode ``fastest``, its biases aligned before; W4A8 in mode
``smallest``; the operands of attention have 8 bits. Differences are in percent of the range of the outputs.

"Exact products": the same with the session option ``session.qdq_matmulnbits_accuracy_level=1``; without it the engine
rounds the inputs of narrow linear layers to 8 bits of its own.
No two programs sum floats in the same order, a sum that ends on the border of two codes takes either, and a deep
network on random weights carries such a flip to its outputs. "Float noise" tells how far: the answers of the packed
model itself, when each input of a layer is multiplied by 1 + 1e-6 n, n normal; the largest of three draws.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fewbits as fb
from fewbits import LayerPlan, Plan, TensorPlan
from fewbits.deploy.verify import engine_name
from fewbits.errors import ExportError
from fewbits.layers import call, quantizable
from fewbits.quantizers import Quantizer
from tests.zoo import READ_DIRECTLY, ZOO, settle, tensors

ACTIVATION = TensorPlan(8, symmetric=False, range="minmax")
ARMS = {"W8A8 fastest": (8, "fastest"), "W4A8 smallest": (4, "smallest")}


@dataclass(frozen=True)
class Parity:
    """Differences from the packed model in percent of the range of the outputs; bytes of the ONNX file.

    largest, median: of ONNX Runtime. exact: the largest with exact products. noise: of the packed model under float
    noise. quantization: of the float model.
    """

    free_batch: bool
    largest: float
    median: float
    exact: float
    noise: float
    quantization: float
    file_bytes: int


def main() -> None:
    """Print the table; leave with status 1 if a model does not export or run."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {engine_name()}\n")
    print("| model | bits, mode | batch | largest | median | exact products | float noise | quantization | file, MB |")
    print("| --- " * 9 + "|")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or ZOO:
            for arm, (bits, mode) in ARMS.items():
                torch.manual_seed(0)
                try:
                    row = cells(parity(*ZOO[name](), bits, mode, Path(folder)))
                except ExportError as error:
                    failed += 1
                    row = f"{error} | | | | | | |"
                print(f"| {name} | {arm} | {row}", flush=True)
    sys.exit(bool(failed))


def cells(found: Parity) -> str:
    """Return the cells of one row."""
    batch = "free" if found.free_batch else "fixed"
    numbers = (f"{n:.3f}" for n in (found.largest, found.median, found.exact, found.noise, found.quantization))
    return f"{batch} | {' | '.join(numbers)} | {found.file_bytes / 1e6:.2f} |"


def parity(model: nn.Module, batch: Any, bits: int, mode: str, folder: Path) -> Parity:
    """Quantize, pack, export and run a float model. Raises ExportError if it does not export or run."""
    settle(model, batch)
    with torch.no_grad():
        before = tensors(call(model.eval(), batch))
        plan = LayerPlan(TensorPlan(bits, granularity="channel", range="minmax"), ACTIVATION, ACTIVATION)
        left_out = [(name, None) for name in READ_DIRECTLY if name in quantizable(model)]
        fb.quantize(model, Plan((("*", plan), *left_out)), verbose=False)
        fb.calibrate(model, [batch])
        if mode == "fastest":
            fb.align_biases(model, batch)
        packed = fb.pack(model, batch)
        want = tensors(call(packed, batch))
    path, free = folder / "model.onnx", True
    try:
        fb.export_onnx(packed, path, batch, mode=mode)
        got = run(path, batch)
    except ExportError:  # OWL-ViT: as many texts as wanted meet each image, so there is no one batch axis
        free = False
        fb.export_onnx(packed, path, batch, mode=mode, dynamic_batch=False)
        got = run(path, batch)
    exact = run(path, batch, exact=True)
    if [t.shape for t in got] != [t.shape for t in want]:
        raise ExportError(f"outputs of shapes {[tuple(t.shape) for t in got]}, not those of the packed model")
    seen, effect = percent(got, want), float(percent(before, want).max())
    noise = max(float(percent(noisy(packed, batch, seed), want).max()) for seed in range(3))
    largest = float(percent(exact, want).max())
    return Parity(free, float(seen.max()), float(seen.median()), largest, noise, effect, path.stat().st_size)


def percent(got: list[Tensor], want: list[Tensor]) -> Tensor:
    """Return all differences in percent of the range of the output that they are in."""
    return torch.cat([(100 * (a - b).abs() / (b.max() - b.min())).flatten() for a, b in zip(got, want)])


def noisy(packed: nn.Module, batch: Any, seed: int) -> list[Tensor]:
    """Return the outputs of a packed model each of whose quantizers sees its input with noise."""
    draw = torch.Generator().manual_seed(seed)

    def disturb(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] * (1 + 1e-6 * torch.randn(args[0].shape, generator=draw)),)

    handles = [m.register_forward_pre_hook(disturb) for m in packed.modules() if isinstance(m, Quantizer)]
    with torch.no_grad():
        outputs = tensors(call(packed, batch))
    for handle in handles:
        handle.remove()
    return outputs


def run(path: Path, batch: Any, exact: bool = False) -> list[Tensor]:
    """Return all float outputs of an ONNX file in ONNX Runtime, on one thread; exact: with exact products."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = batch if isinstance(batch, dict) else {session.get_inputs()[0].name: batch}
    wanted = {i.name for i in session.get_inputs()}
    try:
        outputs = session.run(None, {k: v.numpy() for k, v in given.items() if k in wanted})
    except Exception as error:  # ONNX Runtime raises a dozen classes of its own
        raise ExportError(f"ONNX Runtime cannot run it: {str(error).splitlines()[0]}") from error
    return tensors([torch.from_numpy(o) for o in outputs])


if __name__ == "__main__":
    main()
