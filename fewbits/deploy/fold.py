"""Batch norms that follow a packed layer disappear into its scales and bias.

Which norm follows which layer is observed, not traced: one forward on an example shows whose output is the
input of a batch norm and of nothing else. The fold is exact in real numbers for per-channel scales:
BN(W x + b) = (g / sigma) W x + (b - mean) g / sigma + beta.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fewbits.deploy.packed import PackedLayer
from fewbits.layers import QuantizedLayer, call, float_class
from fewbits.layers.watch import tensors
from fewbits.quantizers import Codes, Grouping

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Uses(TorchFunctionMode):
    """Counts how often each watched tensor is an argument of a torch function."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[int, int] = {}
        self.kept: list[Tensor] = []  # so that no id is given out twice

    def watch(self, tensor: Tensor) -> None:
        self.count[id(tensor)] = 0
        self.kept.append(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in ("__get__", "size", "dim", "numel", "is_contiguous"):
            for value in tensors((args, kwargs or {})):
                if id(value) in self.count:
                    self.count[id(value)] += 1
        return func(*args, **(kwargs or {}))


def fold_batch_norms(packed: nn.Module, example: Any) -> dict[str, str]:
    """Fold every batch norm that directly and solely follows a packed layer, in place.

    example: a batch, as for ``calibrate``. Returns {batch norm name: layer name}; each batch norm becomes its
    output quantizer, or Identity.
    """
    pairs = find_pairs(packed, example)
    modules = dict(packed.named_modules())
    for name, layer in pairs.items():
        norm = modules[name]
        _fold(modules[layer], norm)
        replace_norm(packed, name, getattr(norm, "output_quantizer", None))
    return pairs


def replace_norm(model: nn.Module, name: str, output_quantizer: nn.Module | None) -> None:
    """Put what is left of a folded batch norm in its place: its output quantizer, or nothing."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, output_quantizer or nn.Identity())


def find_pairs(model: nn.Module, example: Any) -> dict[str, str]:
    """Return {batch norm name: layer name} for the pairs in a quantized or packed model that can be folded."""
    uses = _Uses()
    made: dict[int, str] = {}
    runs: dict[str, int] = {}
    fed: dict[str, tuple[str, int]] = {}

    def after_layer(name: str, output: Any) -> None:
        runs[name] = runs.get(name, 0) + 1
        if isinstance(output, Tensor):
            made[id(output)] = name
            uses.watch(output)

    def before_norm(name: str, norm: nn.Module, args: Any, kwargs: Any) -> None:
        runs[name] = runs.get(name, 0) + 1
        for x in tensors((args, kwargs)):
            if id(x) in made:
                fed[name] = (made[id(x)], id(x))

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and module.layer_plan.weight and module.output_quantizer is None:
            handles.append(module.register_forward_hook(lambda m, a, y, name=name: after_layer(name, y)))
        elif float_class(module) in NORMS and module.track_running_stats:
            before = functools.partial(before_norm, name)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        with torch.no_grad(), uses:
            returned = call(model, example)
        for tensor in tensors(returned):  # what the model returns is used by its caller
            if id(tensor) in uses.count:
                uses.count[id(tensor)] += 1
    finally:
        for handle in handles:
            handle.remove()
    return {
        norm: layer
        for norm, (layer, tensor) in fed.items()
        if uses.count[tensor] == 1
        and runs[norm] == 1
        and runs[layer] == 1
        and _channels(model, layer) == model.get_submodule(norm).num_features
    }


def _channels(model: nn.Module, name: str) -> int:
    """Return the channels of a weight; a grouped transposed convolution has more outputs, and is not folded."""
    layer: Any = model.get_submodule(name)
    return int(getattr(layer, layer.weight_name).shape[layer.channel_axis])


def _fold(layer: PackedLayer, norm: nn.Module) -> None:
    scale, shift = (t.float() for t in gain_and_shift(norm))
    weight, bias = layer.packed, layer.bias
    codes = weight.get()
    axis = layer.channel_axis
    rows = _row_channels(codes, axis, len(scale))
    if codes.grouping.granularity == "tensor":
        grouping = Grouping("channel", axis, codes.grouping.contraction)
        spread = {
            k: v.expand(len(scale)) for k in ("scale", "zero_point", "offset") if (v := getattr(codes, k)) is not None
        }
        codes, rows = replace(codes, grouping=grouping, **spread), torch.arange(len(scale))
    offset = None if codes.offset is None else codes.offset * scale[rows]
    weight.put(replace(codes, scale=codes.scale * scale[rows], offset=offset))
    old = torch.zeros_like(shift) if bias is None else bias.detach()
    layer.bias = nn.Parameter(old * scale + shift, requires_grad=False)


def gain_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """Return (g / sigma, beta - mean g / sigma) of a batch norm in float64, [channels] each."""
    sigma = (norm.running_var.double() + norm.eps).sqrt()
    gain = (1.0 if norm.weight is None else norm.weight.detach().double()) / sigma
    shift = (0.0 if norm.bias is None else norm.bias.detach().double()) - norm.running_mean.double() * gain
    return gain, shift


def _row_channels(codes: Codes, axis: int, channels: int) -> Tensor:
    """Return the output channel that each row of the codes belongs to."""
    shape = [1] * codes.values.ndim
    shape[axis] = -1
    index = torch.arange(codes.values.shape[axis]).reshape(shape).expand(codes.values.shape)
    return torch.cat([part[:, 0] for part in codes.grouping.rows(index)])
