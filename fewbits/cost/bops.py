"""Bit operations: multiply-accumulates, each weighed with the bits of both its operands."""

from __future__ import annotations

from fewbits.cost.shapes import LayerShape, ModelShape
from fewbits.errors import PlanError
from fewbits.plan import LayerPlan, Plan, TensorPlan

FLOAT_BITS = 32


def bops(plan: Plan, shape: ModelShape) -> int:
    """Return the bit operations of a plan on the example that the shape was taken with.

    Sum over layers of MACs * weight bits * input bits (Baskin et al. 2021, "UNIQ", section 4.2, without the
    accumulator's share), 32 bits for what stays in float; N:M sparse weights do N / M of their MACs. Raises PlanError
    if the shape was taken without an example.
    """
    if not shape.ran:
        raise PlanError("bit operations need MACs: take the shape with an example, model_shape(model, example)")
    decided = shape.resolve(plan)
    return sum(layer_bops(layer, decided.get(layer.name)) for layer in shape.layers)


def layer_bops(layer: LayerShape, plan: LayerPlan | None) -> int:
    """Return the bit operations of one layer under its own plan."""
    plan = plan or LayerPlan()
    products = round(layer.macs * (FLOAT_BITS if plan.weight is None else plan.weight.mean_bits) * _bits(plan.input))
    if plan.weight is not None and (pattern := plan.weight.pattern) is not None:
        products = pattern.count(products)
    return products + layer.operand_macs * _bits(plan.operands) ** 2


def _bits(plan: TensorPlan | None) -> int:
    return FLOAT_BITS if plan is None else plan.bits
