"""After learnable widths were trained: the layers keep what they came to."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from fewbits.layers.swap import quantized_layers
from fewbits.plan import LayerPlan, Plan
from fewbits.quantizers import LearnableBits, ReleasedBits


def settle_bits(model: nn.Module) -> Plan:
    """Replace learnable widths by the whole ones they have come to, in place; return the plan of all quantized layers.

    Weights stay as they are, and so does what the layers compute: ``maxabs`` of those widths.
    """
    layers = quantized_layers(model)
    for layer in layers.values():
        if isinstance(layer.weight_quantizer, (LearnableBits, ReleasedBits)):
            plan = layer.weight_quantizer.settled_plan()
            weight: Any = getattr(layer, layer.weight_name)
            layer.weight_quantizer = type(layer).make_weight_quantizer(weight.detach(), plan).train(layer.training)
            layer.layer_plan = dataclasses.replace(layer.layer_plan, weight=plan)
    rules: list[tuple[str, LayerPlan | None]] = [(name, layer.layer_plan) for name, layer in layers.items()]
    return Plan(tuple(rules))
