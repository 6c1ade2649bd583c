"""Breadth: quantize, calibrate, forward, backward, pack, and packed equals trained, on twenty architectures."""

from __future__ import annotations

import pytest
import torch

import fewbits as fb
from fewbits import LayerPlan, Plan, TensorPlan
from fewbits.deploy import PackedLayer, code_mismatches
from fewbits.layers import call, quantizable, quantized_layers
from tests.zoo import READ_DIRECTLY, ZOO, settle, tensors

ACTIVATION = TensorPlan(8, symmetric=False, range="minmax")
PLAN = Plan((("*", LayerPlan(TensorPlan(4, granularity="channel", range="minmax"), ACTIVATION, ACTIVATION)),))


@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_goes_the_whole_way(name: str) -> None:
    library = name.split(":")[0]
    pytest.importorskip(library)
    model, batch = ZOO[name]()
    settle(model, batch)
    float_output = tensors(call(model.eval(), batch))
    plan = PLAN.override(*((n, None) for n in READ_DIRECTLY if n in quantizable(model)))
    fb.quantize(model, plan, verbose=False)
    assert quantizable(model).keys() - READ_DIRECTLY <= quantized_layers(model).keys()
    fb.calibrate(model, [batch])

    output = tensors(call(model.eval(), batch))
    assert len(output) == len(float_output)
    assert any(not torch.equal(a, b) for a, b in zip(output, float_output)), "nothing was quantized"

    sum(t.square().mean() for t in tensors(call(model.train(), batch))).backward()
    layers = [m for m in quantized_layers(model).values() if m.weight_quantizer is not None]
    trained = [m for m in layers if getattr(m, m.weight_name).requires_grad]
    reached = [m for m in trained if getattr(m, m.weight_name).grad is not None]
    assert len(reached) >= 0.9 * len(trained)
    assert all(torch.isfinite(getattr(m, m.weight_name).grad).all() for m in reached)
    assert all(m.weight_quantizer.scale.grad is not None for m in reached)

    with torch.no_grad():
        want = tensors(call(model.eval(), batch))
        packed = fb.pack(model)
        got = tensors(call(packed, batch))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert code_mismatches(model, packed) == 0
    assert sum(isinstance(m, PackedLayer) for m in packed.modules()) == len(layers)
