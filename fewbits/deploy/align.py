"""Biases that integer engines can hold exactly.

An engine holds the bias of an integer convolution in int32 units of input scale x weight scale. At few bits half a
unit is enough to move some activations of the next layer to another code, and from there on the engine's answers are
those of a slightly different network. So the trained network is moved, once, by at most half a unit to where the
engine can follow exactly: its biases are rounded to the engine's units (Jacob et al. 2018, section 2.4, fix the unit).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbits.deploy.fold import find_pairs, gain_and_shift
from fewbits.deploy.packed import PackedLayer
from fewbits.errors import QuantizationError
from fewbits.layers import in_eval, quantized_layers
from fewbits.layers.twins import SpatialTwin
from fewbits.quantizers import Codes, Uniform


def align_biases(model: nn.Module, example: Any) -> dict[str, float]:
    """Round the bias of each convolution to the unit of integer engines, in place, after training.

    Where a batch norm follows, its ``bias`` moves; else the layer's own. example: a batch, as for ``calibrate``.
    Returns the largest change of each layer, in units of its result. Convolutions without a static input quantizer of
    at most 8 bits run in float, and are left alone; so are transposed ones with groups, whose channels share units.
    Raises QuantizationError for a model that is packed.
    """
    with in_eval(model):
        norms = {layer: norm for norm, layer in find_pairs(model, example).items()}
    moved: dict[str, float] = {}
    for name, layer in quantized_layers(model).items():
        if isinstance(layer, PackedLayer):
            raise QuantizationError(f"layer {name!r} is packed: align the biases of the trained model, then pack it")
        if isinstance(layer, SpatialTwin) and layer.weight_quantizer is not None:
            delta = _align(layer, model.get_submodule(norms[name]) if name in norms else None)
            moved |= {} if delta is None else {name: float(delta.abs().max())}
    return moved


def _align(layer: Any, norm: Any) -> Tensor | None:
    """Move the bias of a layer, or of the batch norm behind it; return by how much, [channels]."""
    unit = bias_unit(layer.weight_quantizer.encode(layer.weight.detach()), layer.input_quantizer)
    owner = norm or layer
    if unit is None or owner.bias is None or (layer.bias is not None and len(layer.bias) != len(unit)):
        return None
    bias = torch.zeros_like(unit) if layer.bias is None else layer.bias.detach().double()
    if norm is not None:
        gain, shift = gain_and_shift(norm)
        bias, unit = bias * gain + shift, unit * gain.abs()
    delta = ((bias / unit).round() * unit - bias).nan_to_num(0.0)  # a gain of zero leaves no unit
    with torch.no_grad():
        owner.bias += delta.to(owner.bias.dtype)
    return delta


def bias_unit(codes: Codes, activation: nn.Module | None) -> Tensor | None:
    """Return the unit that the bias of each output channel has in an exported convolution, [channels], in float64.

    None where engines do not compute in integers; see ``largest_factor``.
    """
    factor = largest_factor(codes, activation)
    if factor is None:
        return None
    assert isinstance(activation, Uniform)
    return activation.affine()[0].detach().double() * codes.scale.double().abs() / factor


def largest_factor(codes: Codes, activation: nn.Module | None) -> Tensor | None:
    """Return for each output channel the largest k for which codes times k stay within what int8 engines multiply.

    Codes times k with scale / k are the same weight, and k times finer units for the bias. On older x86 pairs of
    u8 x s8 products are summed in 16 bits: they stay below 2**15. None without a static per-tensor ``activation`` of at
    most 8 bits, calibrated, on a grid without gaps, or where a block or a zero point of the weight takes the product
    out of the integers.
    """
    axis = codes.grouping.axis
    channels = codes.values.shape[axis]
    if not isinstance(activation, Uniform) or not activation.calibrated or activation.groups != 1:
        return None
    if activation.grid.bits > 8 or activation.grid.step != 1:
        return None
    if codes.grouping.block is not None or codes.zero_point is not None or codes.scale.numel() not in (1, channels):
        return None
    rows = codes.values.movedim(axis, 0).reshape(channels, -1)
    limit = min(127, 2**14 // (activation.grid.highest - activation.grid.lowest))
    return (limit // rows.abs().amax(1).clamp(min=1)).clamp(min=1)
