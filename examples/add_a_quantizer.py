"""Add a quantizer of your own, and train with it: ternary weights {-s, 0, s} (Li et al. 2016, TWN).

    python examples/add_a_quantizer.py

The name is all that plans, packing, files and ONNX export need to know. Handwritten digits, about ten seconds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fewbits as fb
from fewbits import LayerPlan, Plan, TensorPlan
from fewbits.deploy import code_mismatches
from fewbits.quantizers import Codes, Grouping, Quantizer, register_quantizer
from fewbits.quantizers.codes import make_grid


@register_quantizer("ternary")
class Ternary(Quantizer):
    """Threshold 0.7 E|w|, scale the mean of |w| above it (eq. 5 and 6), taken anew from each tensor, row by row."""

    dynamic = True  # nothing to calibrate

    def __init__(self, plan: TensorPlan, grouping: Grouping, groups: int) -> None:
        super().__init__(plan, grouping, groups)
        self.grid = make_grid(plan.bits, symmetric=True, narrow=True)  # two bits: -1, 0, 1

    def calibrate(self, x: Tensor) -> None:
        """Only look for NaN and Inf."""
        self.require_finite(x)
        self.calibrated += 1

    def encode(self, x: Tensor) -> Codes:
        """Return the codes -1, 0, 1 and a scale for each row of the granularity."""
        self.require_finite(x)
        rows = self.grouping.rows(x.detach().float())
        large = [r.abs() > 0.7 * r.abs().mean(1, keepdim=True) for r in rows]
        scales = [(r.abs() * m).sum(1) / m.sum(1).clamp(min=1) for r, m in zip(rows, large)]
        values = self.grouping.merge([(r.sign() * m).int() for r, m in zip(rows, large)], x.shape)
        return Codes(values, torch.cat(scales), None, None, self.grid, self.grouping, x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the decoded codes, exactly, with a straight-through gradient."""
        return self.encode(x).decode() + (x - x.detach())


def main() -> None:
    """Train the same network with these weights and with learned steps, and pack both."""
    torch.set_num_threads(1)
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    for name in ("ternary", "lsq"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        weight, act = TensorPlan(2, name, granularity="channel"), TensorPlan(8, "ste", symmetric=False)
        fb.quantize(model, Plan((("*", LayerPlan(weight, act)),)), verbose=False)
        fb.calibrate(model, [x[:256]])
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(10):
            for batch in torch.randperm(1437).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
        packed = fb.pack(model)
        right = (packed(x[1437:]).argmax(1) == y[1437:]).float().mean()
        print(f"{name}: {100 * right:.1f} % of the test digits, {code_mismatches(model, packed)} codes differ")


if __name__ == "__main__":
    main()
