"""Small quantized models for the deployment tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fewbits as fb
from fewbits import LayerPlan, Plan, TensorPlan


class Residual(nn.Module):
    """Convolutions with and without a norm, a residual branch and a linear layer; 3x12x12 -> 5."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.shortcut = nn.Conv2d(8, 8, 1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + self.shortcut(x))
        return self.fc(x.mean((2, 3)))


def randomize(model: nn.Module) -> nn.Module:
    """Give batch norms statistics as after training, negative gains included."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model


def plan_for(bits: int, act: int | None = 8, **weight: object) -> Plan:
    """Return one rule for every layer."""
    granularity = weight.pop("granularity", "channel")
    given = TensorPlan(bits, granularity=granularity, **weight)
    return Plan((("*", LayerPlan(given, None if act is None else TensorPlan(act, symmetric=False))),))


def quantized(model: nn.Module, plan: Plan, batches: Sequence[Tensor]) -> nn.Module:
    """Quantize, calibrate, and move the learned parameters off their start."""
    fb.quantize(model, plan, verbose=False)
    fb.calibrate(model, batches)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("quantizer.scale"):
                parameter.mul_(1.1)
    return model.eval()
