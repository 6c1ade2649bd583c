"""Style: everything about a plan but the bit widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fewbits.cost import LayerShape, ModelShape
from fewbits.errors import PlanError
from fewbits.plan import ACTIVATION_BITS, WEIGHT_BITS, LayerPlan, Rule, TensorPlan
from fewbits.quantizers import quantizer_class

DYNAMIC_BLOCK = 128


@dataclass(frozen=True)
class Style:
    """Weights are symmetric, by ``granularity``; inputs and attention operands are affine, per tensor (in blocks of a
    token or position where the quantizer is dynamic).

    first_last: the first and the last layer get at least so many bits; None treats them like the rest. act_bits: of
    inputs and operands; None leaves them in float. act_quantizer: None takes ``quantizer``. range: how initial
    ranges are found, of weights and activations. Raises PlanError for what a plan refuses.
    """

    act_bits: int | None = None
    first_last: int | None = 8
    quantizer: str = "lsq"
    act_quantizer: str | None = None
    granularity: str = "channel"
    block: int | None = None
    range: str = "mse"

    def __post_init__(self) -> None:
        check_bits("first_last", self.first_last, WEIGHT_BITS)
        check_bits("act_bits", self.act_bits, ACTIVATION_BITS)
        self.weight(WEIGHT_BITS[-1])  # raises now rather than layer by layer

    def weight(self, bits: int) -> TensorPlan:
        """Return the plan of a weight of ``bits``."""
        return TensorPlan(
            bits,
            self.quantizer,
            granularity=self.granularity,
            block=self.block,
            range=self.range,
            options=quantizer_class(self.quantizer).weight_options(bits),
        )

    def activation(self, bits: int | None) -> TensorPlan | None:
        """Return the plan of an activation: affine, so that a ReLU output may use every code.

        A dynamic quantizer gets blocks of one token or position, lest the samples of a batch see each other.
        """
        if bits is None:
            return None
        name = self.act_quantizer or self.quantizer
        if quantizer_class(name).dynamic:
            return TensorPlan(bits, name, symmetric=False, granularity="block", block=self.block or DYNAMIC_BLOCK)
        return TensorPlan(bits, name, symmetric=False, range=self.range)

    def at_edge(self, bits: int) -> int:
        """Return the bits of a first or last layer."""
        return max(bits, self.first_last or 0)

    def layer(self, layer: LayerShape, bits: int, *, edge: bool = False) -> LayerPlan:
        """Return the plan of one layer, with what its type has: weight, input, operands of its matmuls."""
        act_bits = self.act_bits
        if edge:
            bits, act_bits = self.at_edge(bits), None if act_bits is None else self.at_edge(act_bits)
        return LayerPlan(
            weight=self.weight(bits) if layer.weight_shape else None,
            input=self.activation(act_bits) if layer.has_input else None,
            operands=self.activation(self.act_bits) if layer.heads else None,
        )

    def rules(self, shape: ModelShape, bits: Mapping[str, int]) -> tuple[Rule, ...]:
        """Return one rule a layer, by exact name, for bits by layer name."""
        edges = edge_layers(shape)
        return tuple(
            (layer.name, self.layer(layer, bits.get(layer.name, 8), edge=layer.name in edges)) for layer in shape.layers
        )


def edge_layers(shape: ModelShape) -> set[str]:
    """Return the names of the first and the last layer with a weight, and of layers that share theirs."""
    weighted = [layer for layer in shape.layers if layer.weight_shape]
    ends = {layer.shared or layer.name for layer in (*weighted[:1], *weighted[-1:])}
    return {layer.name for layer in weighted if (layer.shared or layer.name) in ends}


def check_bits(what: str, bits: int | None, known: tuple[int, ...]) -> None:
    """Raise PlanError unless bits is None or one of ``known``."""
    if bits is not None and (isinstance(bits, bool) or bits not in known):
        raise PlanError(f"{what} must be one of {known}, got {bits!r}")
