"""Choose the bits of every layer so that a network fits into a number of megabytes; nothing is trained.

    python examples/budget.py

ResNet-18 with random weights; give it your own weights to get a plan worth training.
"""

from __future__ import annotations

import torch
from torchvision.models import resnet18

import fewbits as fb
from fewbits.cost import bops, model_shape, size


def main() -> None:
    """Print the plan for 4 MB, and what it and two uniform plans cost."""
    torch.manual_seed(0)
    model, example = resnet18(num_classes=10).eval(), torch.zeros(1, 3, 224, 224)
    shape = model_shape(model, example)
    plan = fb.allocate(model, fb.Budget(size_mb=4.0), example=example, act_bits=8, range="minmax")

    print(f"{'layer':<24}{'weights':>10}{'bits':>6}")
    for name, module in model.named_modules():
        layer = plan.resolve(shape.names, shape.outputs).get(name)
        if layer is not None and layer.weight is not None:
            print(f"{name:<24}{module.weight.numel():>10,}{layer.weight.bits:>6}")

    print(f"\n{'plan':<16}{'MB':>8}{'bits a weight':>15}{'10^9 bit operations':>21}")
    for title, choice in {
        "budget of 4 MB": plan,
        "uniform, 3 bits": fb.uniform_plan(model, 3, act_bits=8, range="minmax"),
        "uniform, 4 bits": fb.uniform_plan(model, 4, act_bits=8, range="minmax"),
    }.items():
        cost = size(choice, shape)
        print(f"{title:<16}{cost.total / 1e6:>8.2f}{cost.average_weight_bits:>15.2f}{bops(choice, shape) / 1e9:>21.0f}")


if __name__ == "__main__":
    main()
