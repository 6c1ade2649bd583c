"""Train 2-bit weights in a plain PyTorch loop, pack them, and check the ONNX file against the packed model.

    python examples/train_in_your_own_loop.py

Handwritten digits (8x8 pixels, part of scikit-learn), about ten seconds on one core.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fewbits as fb


def main() -> None:
    """Train in float, then with 2-bit weights and 4-bit activations; pack, save, export, verify."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y, x_test, y_test = x[order[:1437]], y[order[:1437]], x[order[1437:]], y[order[1437:]]

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    train(model, x, y, epochs=4, lr=3e-3)
    print(f"float: {accuracy(model, x_test, y_test):.1f} %")

    fb.quantize(model, fb.uniform_plan(model, weight_bits=2, act_bits=4))  # first and last layer: 8 bits
    fb.calibrate(model, [x[:256]])
    train(model, x, y, epochs=5, lr=1e-3)  # the same loop, the same optimizer
    trained = accuracy(model, x_test, y_test)

    with tempfile.TemporaryDirectory() as folder:
        fb.align_biases(model, x[:2])  # to what integer engines can hold
        packed = fb.pack(model, x[:2])
        size = fb.save(packed, Path(folder) / "digits.safetensors")
        fb.export_onnx(packed, Path(folder) / "digits.onnx", x[:2])
        report = fb.verify(Path(folder) / "digits.onnx", packed, [x_test])
    print(f"2-bit weights: trained {trained:.1f} %, packed {accuracy(packed, x_test, y_test):.1f} %, {size} bytes")
    print(f"ONNX Runtime gives the same class for {report.top1_agreement:.1f} % of the images")


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float) -> None:
    """Train as you always do."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the percentage of right answers."""
    return 100 * float((model.eval()(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    main()
