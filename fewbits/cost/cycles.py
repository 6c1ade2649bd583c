"""Cycles of the serial shift-add MAC, measured on the codes that a quantizer really gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fewbits.cost.shapes import require_layers
from fewbits.errors import QuantizationError
from fewbits.layers import QuantizedLayer, float_class, quantizable, twin_class
from fewbits.layers.swap import layer_weight, output_only
from fewbits.plan import Plan, TensorPlan
from fewbits.quantizers import Codes, Quantizer

SAMPLE = 1 << 16  # weights of a layer that are looked at


def multiplier_codes(codes: Codes) -> Tensor:
    """Return codes as the n-bit two's complement integers that a multiplier takes, of their shape.

    Signed codes are taken as they are. Odd ones (-3, -1, 1, 3) and those with a zero point or an offset go in as the
    stored index minus 2^(n - 1): what is missing then is a multiple of the sum of the inputs, one addition an input
    for all output channels.
    """
    grid = codes.grid
    if grid.step == 1 and grid.lowest < 0:
        return codes.values
    half: int = 2 ** (grid.bits - 1)
    return grid.index(codes.values) - half


def code_cycles(codes: Tensor, bits: int | Tensor) -> Tensor:
    """Return max(1, set bits) of n-bit two's complement integers, by element. bits: n, or that of each element."""
    field = codes.to(torch.int64) & (2**bits - 1)
    ones = torch.zeros_like(field)
    for k in range(int(torch.as_tensor(bits).max())):
        ones += (field >> k) & 1
    return ones.clamp(min=1)


def weight_cycles(
    model: nn.Module, weight_plan: Callable[[int], TensorPlan], menu: Sequence[int], *, sample: int = SAMPLE
) -> dict[str, dict[int, float]]:
    """Return {layer: {bits: mean cycles of a product}} for each layer that has a weight.

    weight_plan: from bits to the plan of a weight, such as ``Style.weight``. sample: a larger weight is judged by
    evenly spaced channels with about so many elements. The weights are those that the model holds: of one with random
    weights, the cycles are those of random weights. Raises QuantizationError, naming the layer, for weights that are
    not finite.
    """
    return {
        name: {bits: _mean_cycles(name, layer, weight_plan(bits), sample) for bits in menu}
        for name, layer in _weighted(model)
    }


def plan_cycles(model: nn.Module, plan: Plan, *, sample: int = SAMPLE) -> dict[str, float]:
    """Return {layer: mean cycles of a product} under a plan, for the layers whose weight it quantizes.

    A layer that is quantized by that very plan already gives the codes that it was trained to.
    """
    decided = plan.resolve(quantizable(model), output_only(model))
    found = {}
    for name, layer in _weighted(model):
        layer_plan = decided.get(name)
        if layer_plan is not None and layer_plan.weight is not None:
            found[name] = _mean_cycles(name, layer, layer_plan.weight, sample)
    return found


def _weighted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, layer) for name, layer in require_layers(model).items() if layer_weight(layer) is not None)


def _mean_cycles(name: str, layer: nn.Module, plan: TensorPlan, sample: int) -> float:
    try:
        with torch.no_grad():
            quantizer, weight = _quantizer(layer, plan, sample)
            codes = quantizer.encode(weight)
            counted = code_cycles(multiplier_codes(codes), _widths(codes)).double()
            pruned = quantizer.pruned(weight)
    except QuantizationError as problem:
        raise QuantizationError(f"weight of layer {name!r}: {problem}") from problem
    return float((counted if pruned is None else counted[~pruned]).mean())


def _widths(codes: Codes) -> int | Tensor:
    """Return the width of the codes, or where channels differ that of each, shaped to broadcast."""
    if codes.channel_bits is None:
        return codes.bits
    shape = [1] * codes.values.ndim
    shape[codes.grouping.axis] = -1
    return torch.tensor(codes.channel_bits, device=codes.values.device).reshape(shape)


def _quantizer(layer: nn.Module, plan: TensorPlan, sample: int) -> tuple[Quantizer, Tensor]:
    """Return the layer's own quantizer and weight where it follows the plan, else a new one and sampled channels."""
    twin, weight = twin_class(float_class(layer)), layer_weight(layer)
    assert twin is not None and weight is not None
    own = layer.weight_quantizer if isinstance(layer, QuantizedLayer) else None
    if own is not None and own.plan == plan and own.calibrated:
        return own, weight.detach()
    count = weight.shape[twin.channel_axis]
    kept = max(1, min(count, sample * count // max(weight.numel(), 1)))
    index = torch.arange(kept, device=weight.device) * count // kept
    chosen = weight.detach().index_select(twin.channel_axis, index)
    if plan.channel_bits is not None:
        widths = tuple(plan.channel_bits[i] for i in index.tolist())
        plan = replace(plan, bits=max(widths), channel_bits=widths)
    return twin.make_weight_quantizer(chosen, plan), chosen
