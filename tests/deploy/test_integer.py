"""Packed layers in integers: equal to the float operation but for rounding, for every layout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fewbits as fb
from fewbits import LayerPlan, Plan, TensorPlan
from fewbits.deploy.integer import run_in_integers
from fewbits.errors import QuantizationError

STATIC = TensorPlan(4, "ste", symmetric=False)
DENOISE = TensorPlan(4, "denoise", symmetric=False, granularity="block", block=4)
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 5), (2, 3, 12)),
    "conv 1x1": (lambda: nn.Conv2d(8, 6, 1), (2, 8, 5, 4)),
    "conv": (lambda: nn.Conv2d(8, 6, 3, padding=1, stride=2), (2, 8, 7, 6)),
    "conv same": (lambda: nn.Conv2d(8, 6, (4, 3), padding="same", dilation=(1, 2), bias=False), (2, 8, 7, 6)),
    "conv groups": (lambda: nn.Conv2d(8, 6, 3, groups=2), (2, 8, 7, 6)),
    "conv unbatched": (lambda: nn.Conv1d(8, 6, 3, padding=(1,), dilation=2), (8, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, padding="valid"), (2, 4, 3, 4, 5)),
}
WEIGHTS = {
    "tensor": TensorPlan(4),
    "channel": TensorPlan(8, granularity="channel"),
    "odd": TensorPlan(2, granularity="channel", options={"odd": True}),
    "one bit in blocks": TensorPlan(1, "denoise", symmetric=False, granularity="block", block=4),
    "block with a rest": TensorPlan(4, "ste", symmetric=False, granularity="block", block=3),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("weight", "act"),
    [(weight, STATIC) for weight in WEIGHTS] + [(weight, DENOISE) for weight in WEIGHTS if "rest" not in weight],
)
def test_equal_but_for_rounding(layer: str, weight: str, act: TensorPlan) -> None:
    make, shape = LAYERS[layer]
    x = torch.randn(shape) + 0.3
    model = fb.quantize(nn.Sequential(make()), Plan((("0", LayerPlan(WEIGHTS[weight], act)),)), verbose=False)
    fb.calibrate(model, [x])
    packed = fb.pack(model)
    with torch.no_grad():
        want = packed(x)
        assert run_in_integers(packed) == ["0"]
        got = packed(x)
        assert torch.equal(copy.deepcopy(packed)(x), got)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_what_stays_in_float() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_only, self.reflect = nn.Linear(4, 4), nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect")
            self.wide, self.by_channel = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.by_channel(self.wide(self.reflect(self.weight_only(x))))

    four, x = TensorPlan(4), torch.randn(2, 4, 4)
    rules = (
        ("weight_only", LayerPlan(four)),
        ("reflect", LayerPlan(four, STATIC)),
        ("wide", LayerPlan(four, TensorPlan(16, "ste", symmetric=False))),
    )
    rules += (("by_channel", LayerPlan(four, TensorPlan(4, "ste", granularity="channel"))),)
    packed = fb.pack(fb.calibrate(fb.quantize(Net(), Plan(rules), verbose=False), [x]))
    assert run_in_integers(packed) == []


def test_errors() -> None:
    with pytest.raises(QuantizationError, match="takes a packed model"):
        run_in_integers(nn.Linear(2, 2))
    threes = TensorPlan(4, "denoise", symmetric=False, granularity="block", block=3)
    plan = Plan((("*", LayerPlan(WEIGHTS["one bit in blocks"], threes)),))
    x = torch.randn(2, 12)
    packed = fb.pack(fb.calibrate(fb.quantize(nn.Sequential(nn.Linear(12, 4)), plan, verbose=False), [x]))
    run_in_integers(packed)
    with pytest.raises(QuantizationError, match="do not fit"):
        packed(x)


@pytest.mark.parametrize("layer", ["linear", "conv"])
@pytest.mark.parametrize("act", [STATIC, DENOISE])
def test_an_empty_batch(layer: str, act: TensorPlan) -> None:
    make, shape = LAYERS[layer]
    model = fb.quantize(nn.Sequential(make()), Plan((("0", LayerPlan(WEIGHTS["channel"], act)),)), verbose=False)
    packed = fb.pack(fb.calibrate(model, [torch.randn(shape)]))
    empty = torch.randn(0, *shape[1:])
    want = packed(empty)
    run_in_integers(packed)
    assert packed(empty).shape == want.shape and want.numel() == 0


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_operands_go_where_the_layer_goes(layer: str) -> None:
    make, shape = LAYERS[layer]
    x = torch.randn(shape)
    model = fb.quantize(nn.Sequential(make()), Plan((("0", LayerPlan(WEIGHTS["channel"], STATIC)),)), verbose=False)
    packed = fb.pack(fb.calibrate(model, [x]))
    in_integers = copy.deepcopy(packed)
    run_in_integers(in_integers)
    for net in (packed, in_integers):  # as .to(device) does it, but with a change that a CPU shows
        net._apply(lambda t: t * 2 if t.is_floating_point() else t)
    with torch.no_grad():
        torch.testing.assert_close(in_integers(x), packed(x))
