"""A run folder as a small mixed-precision run would leave it, built from arithmetic and a seed."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

CLASSES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def example_layers() -> list[dict[str, Any]]:
    """Return the quantized layers of a CIFAR ResNet-20: first and last at 8 bits, the rest at 1 to 4."""
    random.seed(0)
    shapes = [("conv1", 3, 16, 32)]
    for stage, (width, side) in enumerate(((16, 32), (32, 16), (64, 8)), 1):
        for block in range(3):
            for conv in (1, 2):
                first = block == 0 and conv == 1 and stage > 1
                shapes.append((f"layer{stage}.{block}.conv{conv}", width // 2 if first else width, width, side))
    layers = []
    for index, (name, inputs, outputs, side) in enumerate([*shapes, ("fc", 64, 10, 0)]):
        edge = name in ("conv1", "fc")
        bits = 8 if edge else [4, 3, 3, 2, 2, 2, 1][min(6, index // 3)]
        parameters = inputs * outputs * (9 if side else 1)
        layers.append(
            {
                "name": name,
                "kind": "Conv2d" if side else "Linear",
                "weight_bits": bits,
                "input_bits": 8 if edge else 4,
                "granularity": "channel",
                "quantizer": "lsq",
                "parameters": parameters,
                "macs": parameters * max(1, side * side),
                "bytes": math.ceil(parameters * bits / 8) + 8 * outputs,
                "weight_error": 0.36 * 3.4**-bits * random.uniform(0.8, 1.25),
                "sqnr_db": 4.4 * bits + random.uniform(0.5, 4),
            }
        )
    return layers


def example_histogram(bits: int, spread: float, seed: int) -> dict[str, Any]:
    """Return a bell of weights over 64 bins and the grid of a symmetric quantizer."""
    random.seed(seed)
    edges = [spread * (i / 8 - 4) for i in range(65)]
    counts = [round(400 * math.exp(-(((i - 31.5) / 11) ** 2) / 2) * random.uniform(0.85, 1.15)) for i in range(64)]
    half = 2 ** (bits - 1)
    grid = [spread * 3 * level / half for level in range(-half, half)] if bits > 1 else [-spread, spread]
    return {"edges": edges, "counts": counts, "grid": grid}


def example_confusion(accuracy: float, seed: int) -> list[list[int]]:
    """Return a matrix of 100 samples a class, whose mistakes prefer neighbours (cat and dog)."""
    random.seed(seed)
    rows = [[0] * 10 for _ in range(10)]
    for true, row in enumerate(rows):
        share = accuracy - (0.1 if CLASSES[true] in ("cat", "dog", "bird") else 0)
        for _ in range(100):
            likely = {3: 5, 5: 3, 0: 8, 8: 0, 1: 9, 9: 1}.get(true, random.randrange(10))
            wrong = likely if random.random() < 0.6 else random.randrange(10)
            row[true if random.random() < share else wrong] += 1
    return rows


def example_metrics(accuracy: float, loss: float, seed: int) -> dict[str, Any]:
    """Return top-1 as the confusion matrix has it, top-5 and loss."""
    confusion = example_confusion(accuracy, seed)
    top1 = 100 * sum(confusion[i][i] for i in range(10)) / sum(map(sum, confusion))
    return {"top1": top1, "top5": 99.6 - loss, "loss": loss, "confusion": confusion}


@pytest.fixture
def result() -> dict[str, Any]:
    """A whole ``result.json``, with every part."""
    layers = example_layers()
    codes = sum(math.ceil(layer["parameters"] * layer["weight_bits"] / 8) for layer in layers)
    after = example_metrics(0.94, 0.31, 2)
    size = {"codes": codes, "scales": 5544, "float": 10952, "header": 3712}
    weights = sum(layer["parameters"] for layer in layers)
    return {
        "fewbits": "0.1.0",
        "recipe": "cifar10_resnet20",
        "task": "classification",
        "classes": CLASSES,
        "seconds": {
            "total": 341.2,
            "float_train": 102.4,
            "allocate": 3.9,
            "train": 214.0,
            "pack": 0.42,
            "verify": 9.1,
        },
        "float": {
            "metrics": example_metrics(0.95, 0.24, 1),
            "size_bytes": 1093210,
            "weight_bytes": 4 * weights,
        },
        "quantized": {
            "metrics": after,
            "avg_weight_bits": 8 * codes / weights,
            "size_bytes": sum(size.values()),
            "weight_bytes": codes,
        },
        "packed": {
            "metrics": after,
            "file_bytes": sum(size.values()),
            "code_mismatches": 0,
            "max_abs_diff": 0.0,
        },
        "onnx": {
            "metrics": after,
            "file_bytes": 301877,
            "mode": "fastest",
            "top1_agreement": 100.0,
            "max_abs_diff": 1.9e-6,
            "latency_ms": 1.31,
            "float_latency_ms": 2.07,
            "engine": "onnxruntime 1.31.1",
        },
        "size": size,
        "plan": {
            "layers": layers,
            "not_quantized": [
                *(
                    {
                        "name": f"layer{s}.{b}.bn{n}",
                        "kind": "BatchNorm2d",
                        "reason": "folded into scale and offset when packed",
                    }
                    for s in (1, 2, 3)
                    for b in (0, 1, 2)
                    for n in (1, 2)
                ),
                {"name": "avgpool", "kind": "AdaptiveAvgPool2d", "reason": "has no weight"},
            ],
            "decided_from": {
                "method": "solver",
                "budget": {"average_bits": 2.0},
                "sensitivity": "fisher",
                "seed": 0,
            },
        },
        "histograms": {
            layer["name"]: example_histogram(int(layer["weight_bits"]), 0.08, seed) for seed, layer in enumerate(layers)
        },
        "budget": {"average_bits": 2.0, "size_mb": None, "keep": ["conv1", "fc"]},
        "environment": {
            "python": "3.11.2",
            "torch": "2.15.0",
            "onnxruntime": "1.31.1",
            "cpu": "2 cores",
            "threads": 2,
        },
    }


@pytest.fixture
def log() -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``: training and evaluation, in both spellings of an evaluation."""
    random.seed(3)
    lines: list[dict[str, Any]] = []
    for step in range(0, 1200, 5):
        falling = math.exp(-step / 350)
        loss = 0.28 + 0.9 * falling + random.gauss(0, 0.05)
        lr = 0.01 * (1 + math.cos(math.pi * step / 1200)) / 2
        lines.append({"step": step, "epoch": step // 200, "stage": "train", "loss": loss, "lr": lr})
        if step % 200 == 195:
            lines.append(
                {
                    "step": step,
                    "stage": "train",
                    "eval": {"top1": 93 - 9 * falling, "loss": 0.3 + 0.7 * falling},
                }
            )
    lines.append({"step": 1199, "epoch": 5, "eval/top1": 93.1, "eval/loss": 0.31})
    return lines


@pytest.fixture
def run_folder(tmp_path: Path, result: dict[str, Any], log: list[dict[str, Any]]) -> Path:
    """A folder with both files."""
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return tmp_path
