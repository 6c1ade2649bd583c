"""The shape of a model: all that cost models need to know of it, as plain data.

A shape is taken once, from one forward; plans are then weighed against it without the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from fewbits.cost.observe import Seen, observe
from fewbits.errors import QuantizationError
from fewbits.layers import float_class, quantizable, twin_class
from fewbits.layers.swap import layer_weight, output_only
from fewbits.plan import LayerPlan, Plan
from fewbits.quantizers import Quantizer


@dataclass(frozen=True)
class LayerShape:
    """One quantizable layer.

    weight_shape: () where the layer has no weight of its own. shared: the layer before that owns this very weight,
    or "". channel_axis, contraction_axis: of the weight. itemsize: bytes of a float weight. bias: its elements.
    input_channels: size of the input's channel axis. macs: multiply-accumulates of the example with the weight;
    operand_macs: between two activations (attention). input_elements: of the example. heads: of an attention, 0
    elsewhere; operands: names of what its products take. batch_norm: the norm that folds into this layer when it is
    packed, or ""; norm_bytes: what then vanishes.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    out_channels: int = 0
    macs: int = 0
    bias: int = 0
    input_elements: int = 0
    shared: str = ""
    channel_axis: int = 0
    contraction_axis: int = 1
    itemsize: int = 4
    input_channels: int = 1
    has_input: bool = True
    heads: int = 0
    operands: tuple[str, ...] = ()
    operand_macs: int = 0
    batch_norm: str = ""
    norm_bytes: int = 0

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return math.prod(self.weight_shape) if self.weight_shape else 0


@dataclass(frozen=True)
class ModelShape:
    """layers: the quantizable ones, in module order. outputs: those of which only the result can be quantized.

    float_bytes: all parameters and persistent buffers that are no quantizable weight, each shared tensor once.
    ran: whether an example was run; without, there are no MACs, and no batch norm is taken as folded.
    """

    layers: tuple[LayerShape, ...]
    outputs: tuple[str, ...] = ()
    float_bytes: int = 0
    ran: bool = False
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(layer.name for layer in self.layers))

    def resolve(self, plan: Plan) -> dict[str, LayerPlan | None]:
        """Return what a plan decides for each layer that it names; of a glob rule, what the layer has, as ``quantize``
        does. Raises PlanError for a rule that matches nothing."""
        layers = {layer.name: layer for layer in self.layers}
        return plan.resolve(self.names, self.outputs, lambda name, given: _supported(layers[name], given))

    @property
    def numel(self) -> int:
        """Elements of all quantizable weights, shared ones once."""
        return sum(layer.numel for layer in self.layers if not layer.shared)


def _supported(layer: LayerShape, plan: LayerPlan) -> LayerPlan:
    return replace(
        plan,
        weight=plan.weight if layer.weight_shape else None,
        input=plan.input if layer.has_input else None,
        operands=plan.operands if layer.heads or layer.operand_macs else None,
    )


def model_shape(model: nn.Module, example: Any = None) -> ModelShape:
    """Take the shape of a model, quantized or not, from one forward on ``example``.

    example: a batch: a tensor, a tuple of positional or a mapping of keyword arguments; MACs are those of the whole
    batch. Without one, only sizes are known. The model's mode is restored. Raises QuantizationError if the model
    has no quantizable layer.
    """
    layers = require_layers(model)
    seen = Seen() if example is None else observe(model, layers, example)
    owners: dict[int, str] = {}
    shapes = []
    for name, layer in layers.items():
        weight = layer_weight(layer)
        owner = owners.setdefault(id(weight), name) if weight is not None else name
        shapes.append(_layer_shape(name, layer, seen, "" if owner == name else owner, model))
    return ModelShape(tuple(shapes), tuple(output_only(model)), float_bytes(model), example is not None)


def require_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the quantizable layers by name. Raises QuantizationError if there are none."""
    layers = quantizable(model)
    if not layers:
        kinds = sorted({type(m).__name__ for m in model.modules()})[:8]
        raise QuantizationError(
            f"this {type(model).__name__} has no quantizable layer: it holds {kinds}; expected convolutions, Linear, "
            "Embedding or attention, or register a twin for its layers"
        )
    return layers


def float_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and persistent buffers that are no quantizable weight; shared ones once."""
    skip = {id(layer_weight(layer)) for layer in quantizable(model).values()}
    for module in model.modules():
        if isinstance(module, Quantizer):
            skip |= {id(t) for t in (*module.parameters(), *module.buffers())}
    state = model.state_dict(keep_vars=True).values()
    tensors = {id(t): t for t in state if isinstance(t, Tensor) and id(t) not in skip}
    return sum(_bytes(t) for t in tensors.values())


def _layer_shape(name: str, layer: nn.Module, seen: Seen, shared: str, model: nn.Module) -> LayerShape:
    twin: Any = twin_class(float_class(layer))
    weight, bias = layer_weight(layer), getattr(layer, "bias", None)
    channels = 0 if weight is None else weight.shape[twin.channel_axis]
    norm = seen.norms.get(name, "")
    if norm and model.get_submodule(norm).num_features != channels:
        norm = ""  # a grouped transposed convolution: one scale serves several outputs
    return LayerShape(
        name=name,
        kind=float_class(layer).__name__,
        weight_shape=() if weight is None else tuple(weight.shape),
        out_channels=int(getattr(layer, "out_channels", channels)),
        macs=seen.macs.get(name, 0),
        bias=bias.numel() if isinstance(bias, Tensor) else 0,
        input_elements=seen.input_elements.get(name, 0),
        shared=shared,
        channel_axis=twin.channel_axis,
        contraction_axis=twin.contraction_axis,
        itemsize=4 if weight is None else weight.element_size(),
        input_channels=_ask(twin.input_channels, layer),
        has_input=twin.quantizes_input and weight is not None,
        heads=_ask(twin.head_count, layer) if getattr(twin, "quantizes_operands", False) else 0,
        operands=tuple(getattr(twin, "operand_axes", ())),
        operand_macs=seen.operand_macs.get(name, 0),
        batch_norm=norm,
        norm_bytes=_state_bytes(model.get_submodule(norm)) if norm else 0,
    )


def _ask(count: Callable[[Any], int], layer: nn.Module) -> int:
    try:
        return count(layer)
    except (AttributeError, QuantizationError):
        return 1  # it does not tell, so it cannot have a scale for each channel or head either


def _state_bytes(norm: nn.Module) -> int:
    own: Mapping[str, Any] = {**norm._parameters, **norm._buffers}
    return sum(_bytes(t) for t in own.values() if t is not None)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
