"""What one layer asks of the hardware that runs it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fewbits.cost.bops import FLOAT_BITS
from fewbits.cost.shapes import LayerShape
from fewbits.cost.size import stored_bits
from fewbits.plan import LayerPlan


@dataclass(frozen=True)
class Work:
    """One layer on the example that the shape was taken with; 32 bits stand for float.

    macs: products of the input with the weight, pruned ones left out. operand_macs: between two activations.
    weight_bits: of the widest channel; mean_bits: the mean over channels.
    stored_bits: of one weight in memory, so with the positions of sparse ones. weights: those that are read, once each.
    inputs: elements that are read, once each.
    """

    name: str
    macs: int
    operand_macs: int
    weight_bits: int
    mean_bits: float
    input_bits: int
    operand_bits: int
    weights: int
    stored_bits: float
    inputs: int

    @property
    def all_macs(self) -> int:
        """Products of both sorts."""
        return self.macs + self.operand_macs

    @property
    def weight_bytes(self) -> float:
        """Bytes of one pass over the weight; scales are left out."""
        return self.weights * self.stored_bits / 8

    @property
    def input_bytes(self) -> float:
        """Bytes of one pass over the input."""
        return self.inputs * self.input_bits / 8

    def fed_as_bytes(self) -> Work:
        """Return the same layer with float activations fed as 8 bits."""
        return replace(self, input_bits=8) if self.input_bits == FLOAT_BITS else self

    def at_int8(self) -> Work:
        """Return the same layer, dense, with 8 bits for everything."""
        return replace(self, weight_bits=8, input_bits=8, operand_bits=8, stored_bits=8)


def layer_work(layer: LayerShape, plan: LayerPlan | None, *, dense: bool = False) -> Work:
    """Return the work of one layer under its own plan.

    dense: count the products of pruned weights too. A lookup (an embedding) multiplies nothing, and reads so few rows
    that its weight counts as not read.
    """
    plan = plan or LayerPlan()
    weight, macs = plan.weight, layer.macs
    if weight is not None and weight.pattern is not None and not dense:
        macs = weight.pattern.count(macs)
    return Work(
        name=layer.name,
        macs=macs,
        operand_macs=layer.operand_macs,
        weight_bits=FLOAT_BITS if weight is None else weight.bits,
        mean_bits=FLOAT_BITS if weight is None else weight.mean_bits,
        input_bits=FLOAT_BITS if plan.input is None else plan.input.bits,
        operand_bits=FLOAT_BITS if plan.operands is None else plan.operands.bits,
        weights=layer.numel if layer.macs else 0,
        stored_bits=8 * layer.itemsize if weight is None else stored_bits(weight),
        inputs=layer.input_elements,
    )
