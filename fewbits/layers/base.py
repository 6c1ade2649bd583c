"""The quantized twin of a layer: the same module, same parameters, with quantizers on what it multiplies.

A layer is quantized by changing its class in place to a twin: a mixin from the registry in front of the layer's
own class. Parameters keep their names and identity, so tied weights stay tied, hooks stay hooked, and ``isinstance``
checks still hold. A new layer type is a mixin with a ``forward`` of a few lines (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from fewbits.errors import QuantizationError
from fewbits.plan import LayerPlan, TensorPlan
from fewbits.quantizers import Quantizer, make_quantizer, recomputed

TWINS: dict[str, type[QuantizedLayer]] = {}
_MADE: dict[type, type[QuantizedLayer] | None] = {}  # what twin_class returned before


def type_name(cls: type) -> str:
    """Return ``module.Class``, the key of a layer type in the registry."""
    return f"{cls.__module__}.{cls.__qualname__}"


def quantizes(*types: type | str) -> Callable[[type[QuantizedLayer]], type[QuantizedLayer]]:
    """Class decorator: register a mixin as the twin of layer types, given as classes or as ``module.Class``."""

    def add(mixin: type[QuantizedLayer]) -> type[QuantizedLayer]:
        for cls in types:
            TWINS[cls if isinstance(cls, str) else type_name(cls)] = mixin
        _MADE.clear()  # a class that had no twin may have one now
        return mixin

    return add


class QuantizedLayer(nn.Module):
    """Mixin of every quantized layer.

    channel_axis, contraction_axis: of the weight. input_axis: of the channels of the input. only_output: this type
    has nothing to quantize but its result; plans reach it by its exact name. is_linear: a plain x W (+ bias).
    bypasses_children: the float forward may read a child's weight instead of calling the child.
    mode: "quantize", "observe" (run in float, calibrate input quantizers) or "float".
    """

    channel_axis: ClassVar[int] = 0
    contraction_axis: ClassVar[int] = 1
    input_axis: ClassVar[int] = 1
    quantizes_input: ClassVar[bool] = True
    quantizes_operands: ClassVar[bool] = False
    only_output: ClassVar[bool] = False
    bypasses_children: ClassVar[bool] = False
    is_linear: ClassVar[bool] = False
    weight_name: ClassVar[str] = "weight"
    float_class: ClassVar[type[nn.Module]]

    layer_plan: LayerPlan
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    output_quantizer: Quantizer | None
    mode: str

    def attach(self, plan: LayerPlan, weight_quantizer: Quantizer | None) -> None:
        """Add the quantizers that the plan asks for. Raises QuantizationError for what this type has not."""
        if plan.input is not None and not self.quantizes_input:
            raise QuantizationError(
                f"a {self.float_class.__name__} has no real-valued input: drop 'input' from its plan"
            )
        self.check(plan)
        self.layer_plan, self.mode = plan, "quantize"
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = self.make_input_quantizer(plan.input)
        self.output_quantizer = None if plan.output is None else self._to_device(make_quantizer(plan.output))

    def check(self, plan: LayerPlan) -> None:
        """Raise QuantizationError where this very module cannot follow the plan."""
        if plan.output is not None and plan.output.granularity != "tensor":
            raise QuantizationError(f"an output is quantized per tensor, not per {plan.output.granularity}")
        if plan.operands is not None:
            raise QuantizationError(f"'operands' is for attention, a {self.float_class.__name__} has none")

    @classmethod
    def make_weight_quantizer(cls, weight: Tensor, plan: TensorPlan) -> Quantizer:
        """Build and calibrate the quantizer of a weight of this layer type."""
        quantizer = make_quantizer(
            plan, shape=tuple(weight.shape), axis=cls.channel_axis, contraction=cls.contraction_axis
        ).to(weight.device)
        quantizer.calibrate(weight.detach())
        return quantizer

    def make_input_quantizer(self, plan: TensorPlan | None) -> Quantizer | None:
        """Build the quantizer of what feeds this layer."""
        if plan is None:
            return None
        axis = self.input_channel_axis()
        return self._to_device(make_quantizer(plan, channels=self.input_channels(), axis=axis, contraction=axis))

    def input_channel_axis(self) -> int:
        """Return ``input_axis``, or one that suits this very module better."""
        return self.input_axis

    def _to_device(self, quantizer: Quantizer) -> Quantizer:
        tensors = [*self.parameters(), *self.buffers()]
        return quantizer.to(tensors[0].device) if tensors else quantizer

    def input_channels(self) -> int:
        """Return the size of ``input_axis``."""
        for name in ("in_channels", "in_features", "embed_dim", "nx"):
            if hasattr(self, name):
                return int(getattr(self, name))
        raise QuantizationError(f"{self.float_class.__name__} does not tell its number of input channels")

    def run(self, x: Tensor, op: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return op(input, weight) on the quantized (or, by mode, the float) input and weight, output quantized."""
        weight: Tensor = getattr(self, self.weight_name)
        if self.mode != "quantize":
            if self.mode == "observe" and self.input_quantizer is not None:
                self.input_quantizer.calibrate(x.detach())
            return self.finish(op(x, weight))
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        if self.weight_quantizer is not None:
            if not self.weight_quantizer.calibrated:  # a float checkpoint was loaded after quantize
                self.weight_quantizer.calibrate(weight.detach())
            weight = self.weight_quantizer(weight)
        with recomputed(x, weight):
            y = op(x, weight)
        return self.finish(y)

    def finish(self, y: Tensor) -> Tensor:
        """Return y through the output quantizer, by mode."""
        if self.output_quantizer is None or self.mode == "float":
            return y
        if self.mode == "observe":
            self.output_quantizer.calibrate(y.detach())
            return y
        quantized: Tensor = self.output_quantizer(y)
        return quantized

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self.float_class,), self.__dict__


def activation_quantizers(layer: QuantizedLayer) -> list[Quantizer]:
    """Return the quantizers of a layer that see activations."""
    own = [m for m in layer.children() if isinstance(m, Quantizer)]
    return [q for q in own if q is not layer.weight_quantizer]


def twin_class(float_class: type[nn.Module]) -> type[QuantizedLayer] | None:
    """Return the twin of a layer class, or None if it has none.

    A subclass of a known type counts as that type unless it overrides ``forward``, whose meaning we cannot know.
    """
    if float_class not in _MADE:
        _MADE[float_class] = _make_twin(float_class)
    return _MADE[float_class]


def _make_twin(float_class: Any) -> type[QuantizedLayer] | None:
    if issubclass(float_class, QuantizedLayer):
        return None  # a twin has no twin, whether its mixin has a forward or leaves the float one
    for base in float_class.__mro__:
        mixin = TWINS.get(type_name(base))
        if mixin is not None:
            if float_class.forward is not base.forward:
                return None
            namespace = {"float_class": float_class, "__module__": mixin.__module__}
            return type(f"Quantized{float_class.__name__}", (mixin, float_class), namespace)
    return None


def _rebuild(float_class: type[nn.Module]) -> QuantizedLayer:
    twin = twin_class(float_class)
    if twin is None:
        raise QuantizationError(f"{type_name(float_class)} has no quantized twin: import what registers it first")
    return twin.__new__(twin)
