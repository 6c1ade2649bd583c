"""Find the convolutions whose result leaves the integers: where engines need an output quantizer.

An engine runs a convolution on integers only where its result is quantized, too (docs/deployment.md). The input
quantizer of the next layer does that, unless the result is added, concatenated, pooled or the like before.
One forward on an example shows it; nothing is traced. A linear layer runs on integers whatever becomes of its result.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fewbits.layers.base import twin_class
from fewbits.layers.swap import call, float_class, in_eval, output_only, quantizable
from fewbits.layers.twins import SpatialTwin
from fewbits.layers.watch import tensors

# engines move a quantizer through these, so what comes behind them counts
TRANSPARENT = {
    "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "dropout", "dropout2d", "contiguous", "flatten", "reshape",
    "view", "permute", "transpose", "squeeze", "unsqueeze",
}  # fmt: skip


class _Ends(TorchFunctionMode):
    """Follows the results of modules to what uses them. uses: by module, "open" or the name of a module."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.modules, self.inside = modules, 0
        self.source: dict[int, str] = {}  # the module that a tensor comes from
        self.kept: list[Tensor] = []  # so that no id is given out twice
        self.uses: dict[str, list[str]] = {name: [] for name in modules}

    def follow(self, tensor: Any, name: str) -> None:
        if isinstance(tensor, Tensor):
            self.source[id(tensor)] = name
            self.kept.append(tensor)

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.use((args, kwargs), name)
        self.inside += 1

    def leave(self, name: str, result: Any) -> None:
        self.inside -= 1
        self.follow(result, name)

    def use(self, args: Any, by: str) -> None:
        for value in tensors(args):
            if id(value) in self.source:
                self.uses[self.source[id(value)]].append(by)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.inside or not tensors(result):
            return result
        if getattr(func, "__name__", "") in TRANSPARENT and args and id(args[0]) in self.source:
            self.follow(result, self.source[id(args[0])])
        else:
            self.use((args, kwargs or {}), "open")
        return result


def open_ends(model: nn.Module, example: Any, inputs: Collection[str] | None = None) -> list[str]:
    """Return the names of convolutions, or of the batch norms behind them, whose result needs an output quantizer.

    example: a batch, as for ``calibrate``. inputs: names of the layers whose input a plan quantizes; None: all that
    can be quantized. What the model returns stays as it is. The model may be quantized or not.
    """
    layers, norms = quantizable(model), output_only(model)
    inputs = layers.keys() if inputs is None else inputs
    ends = _Ends({**layers, **norms})
    handles: list[Any] = []
    for name, module in ends.modules.items():
        enter = functools.partial(ends.enter, name)
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda m, args, y, name=name: ends.leave(name, y)))
    try:
        with in_eval(model), torch.no_grad(), ends:
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, layer in layers.items():
        twin = twin_class(float_class(layer))
        if name in inputs and twin is not None and issubclass(twin, SpatialTwin):
            used = ends.uses[name]
            end = used[0] if len(used) == 1 and used[0] in norms else name  # a norm that pack folds
            found += [end] if any(by not in inputs for by in ends.uses[end]) else []
    return sorted(found, key=list(ends.modules).index)
