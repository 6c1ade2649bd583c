"""What one forward shows of a model: how often each weight is used, and which batch norm follows which layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from fewbits.layers import call, float_class, set_mode, twin_class
from fewbits.layers.swap import layer_weight, output_only

LOOKS = ("__get__", "size", "dim", "numel", "is_contiguous")  # these read no values: no use of a tensor


@dataclass
class Seen:
    """By layer name: multiply-accumulates, input elements, and the batch norm that solely follows it."""

    macs: Counter[str] = field(default_factory=Counter)
    operand_macs: Counter[str] = field(default_factory=Counter)
    input_elements: Counter[str] = field(default_factory=Counter)
    norms: dict[str, str] = field(default_factory=dict)


def observe(model: nn.Module, layers: Mapping[str, nn.Module], example: Any) -> Seen:
    """Run ``model`` on a batch, in float and eval mode, without gradients; return what was seen of ``layers``."""
    seen, watch = Seen(), _Watch({id(layer_weight(layer)): name for name, layer in layers.items()})
    training = {module: module.training for module in model.modules()}
    names = {layer: name for name, layer in layers.items()}
    norms = {norm: name for name, norm in output_only(model).items() if getattr(norm, "track_running_stats", False)}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        watch.active.append(names[module])

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = watch.active.pop()
        inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        seen.input_elements[name] += inputs[0].numel() if inputs else 0
        seen.macs[name] += weight_macs(module, inputs, output)
        if isinstance(module, nn.MultiheadAttention):
            watch.operand_macs[name] = 0  # it may or may not call scaled_dot_product_attention
            inner, result, between = attention_macs(module, *args, **kwargs)
            seen.macs[name] += inner
            child = f"{name}.out_proj".lstrip(".")
            if not watch.runs[child]:  # torch reads its weight without a call
                seen.macs[child] += result
                seen.input_elements[child] += result // module.embed_dim
            seen.operand_macs[name] += between
        watch.made(name, output)

    handles: list[Any] = []
    for layer in names:
        handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(layer.register_forward_hook(leave, with_kwargs=True))
    for norm, name in norms.items():
        handles.append(norm.register_forward_pre_hook(lambda m, args, name=name: watch.fed(name, args[0])))
    try:
        model.eval()
        with set_mode(model, "float"), torch.no_grad(), watch:
            watch.returned(call(model, example))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    seen.norms = watch.pairs()
    seen.macs.update(watch.read_macs)
    seen.input_elements.update(watch.read_elements)
    seen.operand_macs.update(watch.operand_macs)
    return seen


def weight_macs(layer: nn.Module, inputs: Sequence[Tensor], output: Any) -> int:
    """Return the MACs of a layer's input with its weight: none for a lookup."""
    twin, weight = twin_class(float_class(layer)), layer_weight(layer)
    if twin is None or weight is None or not twin.quantizes_input or not isinstance(output, Tensor):
        return 0
    if getattr(layer, "transposed", False):  # every input element meets a whole slice of the weight
        return inputs[0].numel() * weight.numel() // weight.shape[twin.contraction_axis]
    return output.numel() * weight.numel() // weight.shape[twin.channel_axis]


def product_macs(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Return the MACs of scaled dot product attention: query [..., L, E], key [..., S, E], value [..., S, V]."""
    return query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def matmul_macs(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Return the MACs of a batched product of two activations, a [..., L, E] and b [..., E, S]."""
    between = a.ndim >= 3 and b.ndim >= 3 and not isinstance(b, nn.Parameter)
    return a.numel() * b.shape[-1] if between else 0


PRODUCTS: dict[str, Callable[..., int]] = {
    "scaled_dot_product_attention": product_macs,
    "matmul": matmul_macs,
    "__matmul__": matmul_macs,
    "bmm": matmul_macs,
}


def attention_macs(
    layer: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[int, int, int]:
    """Return the MACs of nn.MultiheadAttention: input projections, output projection, the two inner products."""
    width = layer.embed_dim
    length = key.shape[1 if layer.batch_first and key.ndim == 3 else 0]
    return (
        (query.numel() + key.numel() + value.numel()) * width,
        query.numel() * width,
        2 * query.numel() * length,
    )


class _Watch(TorchFunctionMode):
    """Counts how often each layer's output is used, and the MACs that layers spend without calling a child layer.

    weights: the layer's name by the id of its weight.
    """

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.active: list[str] = []
        self.operand_macs: Counter[str] = Counter()
        self.read_macs: Counter[str] = Counter()
        self.read_elements: Counter[str] = Counter()
        self.uses: Counter[int] = Counter()
        self.runs: Counter[str] = Counter()
        self.maker: dict[int, tuple[str, Tensor]] = {}  # keeps the tensor, so that no id is given out twice
        self.eater: dict[str, int] = {}

    def made(self, name: str, output: Any) -> None:
        self.runs[name] += 1
        if isinstance(output, Tensor):
            self.maker.setdefault(id(output), (name, output))

    def fed(self, norm: str, x: Tensor) -> None:
        self.runs[norm] += 1
        self.eater[norm] = id(x)

    def returned(self, output: Any) -> None:
        with torch._C.DisableTorchFunction():
            self.uses.update(id(t) for t in tree_iter(output))

    def pairs(self) -> dict[str, str]:
        """Return {layer: norm} where the norm is all that uses the layer's output, and both ran once."""
        found = {}
        for norm, x in self.eater.items():
            layer = self.maker[x][0] if x in self.maker else ""
            if layer and self.uses[x] == 1 and self.runs[norm] == self.runs[layer] == 1:
                found[layer] = norm
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in LOOKS:
            self.uses.update(id(t) for t in tree_iter((args, kwargs)) if id(t) in self.maker)
        if name == "linear":
            self.read(*args, **kwargs)
        elif self.active and name in PRODUCTS:
            self.operand_macs[self.active[-1]] += PRODUCTS[name](*args, **kwargs)
        return func(*args, **kwargs)

    def read(self, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> None:
        """Count a product with the weight of a layer that is not called itself, as Swin's attention does."""
        name = self.weights.get(id(weight), "")
        if name and name not in self.active:
            self.read_macs[name] += x.numel() * weight.shape[0]
            self.read_elements[name] += x.numel()
