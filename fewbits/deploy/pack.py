"""Pack: from a trained model to integers. What was trained is what is stored."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fewbits.deploy.fold import fold_batch_norms
from fewbits.deploy.packed import PackedLayer, PackedWeight, pack_layer
from fewbits.errors import PlanError
from fewbits.layers import QuantizedLayer, Watch, quantized_layers


def pack(model: nn.Module, example: Any = None) -> nn.Module:
    """Return a packed copy of a quantized model, in eval mode; the model itself stays as it is.

    Without an example, ``packed(x)`` equals ``model.eval()(x)`` bit for bit. With an example batch, batch norms
    that follow a packed layer are folded into its scales and bias, which is equal to float32 rounding.
    Raises PlanError if nothing is quantized, and QuantizationError, naming the layer, for weights that are not finite,
    or where the example (as ``calibrate`` before it) shows that a planned weight is read without calling its layer.
    """
    if not quantized_layers(model):
        raise PlanError("nothing in this model is quantized: call fewbits.quantize(model, plan) before pack")
    packed = copy.deepcopy(model).eval().requires_grad_(False)
    shared: dict[nn.Parameter, PackedWeight] = {}  # tied weights are packed once
    for layer in quantized_layers(packed).values():
        if layer.weight_quantizer is not None:
            weight = getattr(layer, layer.weight_name)
            if weight not in shared:
                shared[weight] = _encode(layer)
            pack_layer(layer, shared[weight])
    packed.folded = {}  # type: ignore[assignment]
    if example is not None:
        with Watch(quantized_layers(packed)) as watch:
            packed.folded = fold_batch_norms(packed, example)  # type: ignore[assignment]
        watch.refuse_reads()
    return packed


def code_mismatches(model: nn.Module, packed: nn.Module) -> int:
    """Count the codes of a packed model that differ from those of the trained model: zero, or something is wrong."""
    count = 0
    for name, layer in quantized_layers(model).items():
        twin = packed.get_submodule(name)
        if layer.weight_quantizer is not None and isinstance(twin, PackedLayer):
            trained = layer.weight_quantizer.encode(getattr(layer, layer.weight_name).detach()).values
            count += int((trained != twin.packed.get().values).sum())
    return count


def _encode(layer: QuantizedLayer) -> PackedWeight:
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    weight = getattr(layer, layer.weight_name).detach()
    if not quantizer.calibrated:
        quantizer.calibrate(weight)
    return PackedWeight(quantizer.encode(weight))
