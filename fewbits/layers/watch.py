"""Watch quantized layers while a model runs: which are called, and whose weight is read without a call.

Some owners read ``child.weight`` instead of calling the child (DETR's table of queries). The child's quantizer then
never runs: the weight is trained in float, and packed as something else. Nothing is traced; one forward shows it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewbits.errors import QuantizationError
from fewbits.layers.base import QuantizedLayer, activation_quantizers
from fewbits.plan import LayerPlan


class Watch(TorchFunctionMode):
    """Context manager around forwards of the model that has these layers, quantized or packed.

    running: names of the layers that run now, the innermost last. reached: those that were called. read: those with
    a planned weight that a torch function took outside of any layer that owns it; shapes and types may be read.
    """

    def __init__(self, layers: Mapping[str, QuantizedLayer]) -> None:
        super().__init__()
        self.layers, self.running = layers, list[str]()
        self.reached, self.read = set[str](), set[str]()
        self.owners: dict[int, set[str]] = {}  # of a weight, or of a packed layer, whose weights are made on access
        self.handles: list[Any] = []
        for name, layer in layers.items():
            if layer.layer_plan.weight is not None:
                self.owners.setdefault(id(layer._parameters.get(layer.weight_name, layer)), set()).add(name)

    def __enter__(self) -> Watch:
        for name, layer in self.layers.items():
            self.handles.append(layer.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            self.handles.append(layer.register_forward_hook(lambda *_: self._leave(), always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()

    def _enter(self, name: str) -> None:
        self.running.append(name)
        self.reached.add(name)

    def _leave(self) -> None:
        self.running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call func, and note the weights whose values it has used."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__
        if name == "grad" or name.startswith("new_") or name.endswith("_like") or not tensors(result):
            return result
        of_first = name == "to" or name.endswith("_as")  # of the other they take the type or the shape
        for value in tensors(args[:1] if of_first else (args, kwargs or {})):
            owners = self.owners.get(id(getattr(value, "fewbits_layer", value)), set())
            if owners.isdisjoint(self.running):
                self.read |= owners
        return result

    def refuse_reads(self) -> None:
        """Raise QuantizationError if the weight of a layer was read without calling the layer."""
        if self.read:
            first = min(self.read)
            more = f" (and so with {sorted(self.read - {first})})" if len(self.read) > 1 else ""
            raise QuantizationError(
                f"layer {first!r}{more}: the model reads the weight of this {self.layers[first].float_class.__name__} "
                "without calling the layer, so it is trained in float and would be packed as something else: "
                f"leave it out of the plan, as by plan.override(({first!r}, None))"
            )

    def warn_unreached(self, *, stacklevel: int) -> None:
        """Warn of planned layers that were not called, or whose activations were never seen."""
        unreached = [
            name
            for name, layer in self.layers.items()
            if (name not in self.reached and layer.layer_plan != LayerPlan())
            or any(not q.calibrated for q in activation_quantizers(layer))
        ]
        if unreached:
            warnings.warn(
                f"no calibration batch reached the input of {len(unreached)} layers: {unreached[:6]}; "
                "calibrate on batches that use them, or leave them out of the plan",
                stacklevel=stacklevel + 1,
            )


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [t for item in tree for t in tensors(item)] if isinstance(tree, (list, tuple)) else []
