"""Sizes and speed of what is deployed: packed files and ONNX by bits, next to the ideal and to float.

    python -m benchmarks.deploy > docs/results/deploy_sizes.md

ResNet-20 (32 px, 10 classes) and ResNet-18 (224 px, 1000 classes) on random weights: sizes and latencies do not depend
on what a network has learned. First and last layer have 8 bits. Ideal: the bytes of codes, scales and what stays in
float, as the cost model counts them. Latency: one image, one thread, float and quantized in turn, median of 15.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import fewbits as fb
from fewbits import LayerPlan, Plan, TensorPlan
from fewbits.cost import model_shape, size
from fewbits.deploy import export_float
from fewbits.deploy.verify import engine_name, latencies, open_session
from fewbits.layers import open_ends
from fewbits.tasks import build_model

OUTPUT = LayerPlan(output=TensorPlan(8, "ste", symmetric=False))


def main() -> None:
    """Print both tables."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {engine_name()}\n")
    print("| model | weight bits | ideal, bytes | packed file | ONNX smallest | ONNX fastest | float ONNX |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    timed = []
    with tempfile.TemporaryDirectory() as folder:
        for name, model_name, x in (
            ("ResNet-20", "resnet20", torch.rand(2, 3, 32, 32)),
            ("ResNet-18", "torchvision:resnet18", torch.rand(2, 3, 224, 224)),
        ):
            classes = 10 if name == "ResNet-20" else 1000
            float_file = export_float(build_model(model_name, classes), Path(folder) / "float.onnx", x)
            for bits in (1, 2, 3, 4):
                model = build_model(model_name, num_classes=classes)
                row, fastest, smallest = measure(model, bits, x, Path(folder))
                print(f"| {name} | {bits} | {row} | {float_file.stat().st_size:,} |", flush=True)
                if bits in (2, 4):
                    for mode, path in (("fastest", fastest), ("smallest", smallest)):
                        own, theirs = latencies(open_session(path), float_file, (x[:1],), 1)
                        assert theirs is not None
                        timed.append(f"| {name} | {bits} | {mode} | {own:.2f} | {theirs:.2f} | {own / theirs:.2f} |")
    print("\n| model | weight bits | mode | ms | float, ms | ratio |\n| --- | --- | --- | --- | --- | --- |")
    print("\n".join(timed))


def measure(model: nn.Module, bits: int, x: Tensor, folder: Path) -> tuple[str, Path, Path]:
    """Return the sizes of one model at one width as cells, and the two ONNX files."""
    plan = fb.uniform_plan(model, bits, 4 if bits > 1 else 8, quantizer="ste", range="minmax")
    ideal = size(plan, model_shape(model, x)).total
    plan = Plan((*plan, *((n, OUTPUT) for n in open_ends(model, x))))
    fb.calibrate(fb.quantize(model, plan, verbose=False), [x])
    packed = fb.pack(model, x)
    file = fb.save(packed, folder / "m.safetensors")
    paths = {mode: folder / f"{mode}.onnx" for mode in ("smallest", "fastest")}
    written = {mode: fb.export_onnx(packed, path, x, mode=mode).file_bytes for mode, path in paths.items()}
    over = [f"{n:,} ({100 * (n / ideal - 1):+.1f} %)" for n in (file, written["smallest"])]
    return f"{ideal:,} | {over[0]} | {over[1]} | {written['fastest']:,}", paths["fastest"], paths["smallest"]


if __name__ == "__main__":
    main()
