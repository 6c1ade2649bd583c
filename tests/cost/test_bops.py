"""Bit operations by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewbits.cost import LayerShape, ModelShape, bops, model_shape
from fewbits.errors import PlanError
from fewbits.plan import LayerPlan, Plan, TensorPlan

SHAPE = ModelShape(
    (
        LayerShape("conv", "Conv2d", (4, 3, 3, 3), macs=1000),
        LayerShape("attention", "MultiheadAttention", (12, 4), macs=100, operand_macs=10, heads=2),
    ),
    ran=True,
)


def test_float_weighs_32_by_32() -> None:
    assert bops(Plan(()), SHAPE) == 1110 * 32 * 32


def test_each_operand_weighs_with_its_own_bits() -> None:
    conv = LayerPlan(TensorPlan(2), TensorPlan(4))
    attention = LayerPlan(TensorPlan(8), None, TensorPlan(6))
    plan = Plan((("conv", conv), ("attention", attention)))
    assert bops(plan, SHAPE) == 1000 * 2 * 4 + 100 * 8 * 32 + 10 * 6 * 6


def test_sparse_weights_do_their_share() -> None:
    plan = Plan((("conv", LayerPlan(TensorPlan(1, sparsity="2:8"), TensorPlan(4))),))
    assert bops(plan, SHAPE) == 1000 * 4 // 4 + 110 * 32 * 32


def test_a_shape_without_an_example_has_no_operations() -> None:
    model = nn.Linear(3, 4)
    with pytest.raises(PlanError, match="with an example"):
        bops(Plan(()), model_shape(model))
    assert bops(Plan(()), model_shape(model, torch.randn(5, 3))) == 5 * 3 * 4 * 1024
