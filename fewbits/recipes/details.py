"""What the report shows of each layer: bits, bytes, errors, and weights on their grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbits.cost import LayerShape, ModelShape, Size
from fewbits.layers import QuantizedLayer, float_class, quantized_layers, report_layers, set_mode
from fewbits.quantizers import Codes

BINS = 64


def layer_rows(model: nn.Module, shape: ModelShape, sizes: Size, inputs: Tensor) -> list[dict[str, Any]]:
    """Return one row a quantized layer, by the keys of the report. inputs: for the output errors."""
    layers, by_name = quantized_layers(model), {layer.name: layer for layer in shape.layers}
    stored, noise = {row.name: row.codes + row.scales for row in sizes.layers}, output_sqnr(model, inputs)
    rows = []
    for name, layer in layers.items():
        if name in by_name:
            row = _row(name, layer, by_name[name])
            rows.append({**row, "bytes": stored[name], "sqnr_db": noise.get(name)})
    return rows


def _row(name: str, layer: QuantizedLayer, shape: LayerShape) -> dict[str, Any]:
    plan = layer.layer_plan
    weight, given = plan.weight, plan.input or plan.operands
    return {
        "name": name,
        "kind": float_class(layer).__name__,
        "weight_bits": None if weight is None else weight.mean_bits,
        "channel_bits": {} if weight is None or not weight.channel_bits else tally(weight.channel_bits),
        "input_bits": None if given is None else given.bits,
        "granularity": None if weight is None else weight.granularity,
        "quantizer": None if weight is None else weight.quantizer,
        "parameters": 0 if shape.shared else shape.numel,
        "macs": shape.macs,
        "weight_error": _weight_error(layer),
    }


def tally(widths: tuple[int, ...]) -> dict[str, int]:
    """Return how many channels have each width, {bits: channels}."""
    return {str(bits): widths.count(bits) for bits in sorted(set(widths))}


def not_quantized(model: nn.Module) -> list[dict[str, str]]:
    """Return the modules with parameters that stay in float, and why."""
    rows = [row for row in report_layers(model) if row.plan is None]
    return [{"name": row.name, "kind": row.kind, "reason": row.reason} for row in rows]


def histograms(model: nn.Module) -> dict[str, Any]:
    """Return, by layer, the weights in steps of their own scale, and the codes that stand for them.

    So the channels of a layer, each with its own scale, share one grid.
    """
    found = {}
    for name, layer in quantized_layers(model).items():
        codes, weight = _codes(layer)
        if codes is None:
            continue
        steps = _in_steps(weight, codes).double()
        grid = list(range(codes.grid.lowest, codes.grid.highest + 1, codes.grid.step))
        counts, edges = torch.histogram(steps.flatten(), BINS)
        found[name] = {"edges": edges.tolist(), "counts": counts.tolist(), "grid": grid}
    return found


def output_sqnr(model: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Return the signal to noise ratio of each layer's output in dB: quantized against float, on the same input.

    Layers that are not called themselves, or whose output is exact, have none.
    """
    found: dict[str, float] = {}
    handles = []

    def compare(name: str, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        with set_mode(layer, "float"):
            exact = layer.forward(*args, **kwargs)
        noise, signal = (output - exact).double().square().sum(), exact.double().square().sum()
        if noise > 0 and signal > 0:
            found[name] = float(10 * torch.log10(signal / noise))

    for name, layer in quantized_layers(model).items():
        handles.append(
            layer.register_forward_hook(lambda m, a, k, y, name=name: compare(name, m, a, k, y), with_kwargs=True)
        )
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return found


def _codes(layer: QuantizedLayer) -> tuple[Codes | None, Tensor]:
    if layer.weight_quantizer is None:
        return None, torch.empty(0)
    weight: Tensor = getattr(layer, layer.weight_name).detach()
    return layer.weight_quantizer.encode(weight), weight


def _weight_error(layer: QuantizedLayer) -> float | None:
    """Return the squared error of the quantized weight, relative to the squared weight."""
    codes, weight = _codes(layer)
    if codes is None:
        return None
    power = float(weight.double().square().sum())
    return float((codes.decode() - weight).double().square().sum()) / power if power else 0.0


def _in_steps(weight: Tensor, codes: Codes) -> Tensor:
    """Return weights as codes that are not rounded."""
    parts = codes.grouping.rows(weight)
    scales = codes.grouping.split(codes.scale, parts)
    zeros = _columns(codes, codes.zero_point, parts)
    offsets = _columns(codes, codes.offset, parts)
    return torch.cat([((p - o) / s + z).flatten() for p, s, z, o in zip(parts, scales, zeros, offsets)])


def _columns(codes: Codes, values: Tensor | None, parts: list[Tensor]) -> list[Any]:
    return [0.0] * len(parts) if values is None else codes.grouping.split(values.to(codes.scale.dtype), parts)
