"""A quantized model learns in a plain loop, at few bits, with no hook and no special optimizer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.layers import quantize
from fewbits.plan import LayerPlan, Plan, TensorPlan


def problem() -> tuple[Tensor, Tensor]:
    """Return 96 points of three spirals, and their class."""
    turn = torch.linspace(0.2, 1, 32).repeat(3)
    label = torch.arange(3).repeat_interleave(32)
    angle = 4 * turn + label * 2.094
    return torch.stack([turn * angle.sin(), turn * angle.cos()], 1), label


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    x, label = problem()
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("bits", "quantizer"), [(2, "ste"), (2, "lsq"), (2, "lsq+"), (3, "lsq"), (4, "ste"), (4, "lsq+")]
)
def test_the_loss_falls(bits: int, quantizer: str, optimizer: str) -> None:
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))
    weight = TensorPlan(bits, quantizer, symmetric=quantizer != "lsq+", granularity="channel")
    act = TensorPlan(bits, quantizer, symmetric=False)
    plan = Plan((("*", LayerPlan(weight=weight, input=act)), ("0", LayerPlan(weight=weight))))
    quantize(model, plan, verbose=False)
    make = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=0.01),
    }
    losses = train(model, make[optimizer](), 50)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    at_most = 0.8 if quantizer == "ste" else 0.65  # a learned step goes further in as many steps
    assert sum(losses[-5:]) / 5 < at_most * losses[0]


def test_bfloat16_autocast_and_gradient_accumulation() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    plan = LayerPlan(weight=TensorPlan(4, granularity="channel"), input=TensorPlan(4, symmetric=False))
    quantize(model, Plan((("*", plan),)), verbose=False)
    x, label = torch.randn(6, 1, 6, 6), torch.randint(3, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        for part, classes in zip(x.chunk(2), label.chunk(2)):
            F.cross_entropy(model(part), classes).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
        assert parameter.grad.dtype == torch.float32
