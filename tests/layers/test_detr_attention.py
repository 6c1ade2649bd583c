"""Deformable and two-way attention of the transformers library: exact in float, and every operand quantized by head."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.errors import QuantizationError
from fewbits.layers import activation_quantizers, calibrate, quantize, set_mode
from fewbits.plan import LayerPlan, Plan, TensorPlan

FAMILIES = {"grounding_dino": "GroundingDino", "mm_grounding_dino": "MMGroundingDino", "omdet_turbo": "OmDetTurbo"}
SHAPES = [(4, 4), (2, 2)]


def deformable(family: str) -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    name = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(d_model=16, num_feature_levels=2)
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    layer = getattr(module, f"{name}MultiscaleDeformableAttention")(config, 4, 3)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    given = {
        "hidden_states": torch.randn(2, 5, 16),
        "encoder_hidden_states": torch.randn(2, 20, 16),
        "reference_points": torch.rand(2, 5, 1, 4).expand(-1, -1, 2, -1),
        "spatial_shapes": torch.tensor(SHAPES),
        "spatial_shapes_list": SHAPES,
    }
    return layer, given


def two_way(family: str) -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    name = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(d_model=16, encoder_ffn_dim=32, encoder_attention_heads=8)
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    layer = getattr(module, f"{name}BiMultiHeadAttention")(config).eval()
    mask = torch.tensor([[False] * 4, [False, False, True, True]])
    vision, text = torch.randn(2, 20, 16), torch.randn(2, 4, 16)
    return layer, {"vision_features": vision, "text_features": text, "text_attention_mask": mask}


CASES = [
    *((deformable, family, {"probability", "value"}) for family in FAMILIES),
    *(
        (two_way, family, {"query", "key", "probability", "value", "text_probability", "text_value"})
        for family in ("grounding_dino", "mm_grounding_dino")
    ),
]


def answers(layer: nn.Module, given: dict[str, Any]) -> list[Tensor]:
    """Return the outputs without the probabilities, which are as before quantization in deformable attention."""
    first, second = layer(**given)
    return [first] if isinstance(first, Tensor) else [first[0], second[0]]


@pytest.mark.parametrize(("make", "family", "names"), CASES, ids=lambda x: getattr(x, "__name__", str(x))[:20])
def test_operands_are_quantized_by_head(make: Any, family: str, names: set[str]) -> None:
    layer, given = make(family)
    expected = answers(layer, given)
    errors = {}
    for bits in (16, 8, 2):
        twin: Any = copy.deepcopy(layer)
        operands = TensorPlan(bits, "lsq+", symmetric=False, granularity="head")
        quantize(twin, Plan((("", LayerPlan(operands=operands)),)), verbose=False)
        calibrate(twin, [given])
        found = {name: getattr(twin, f"{name}_quantizer") for name in names}
        assert len(activation_quantizers(twin)) == len(names)
        heads = twin.head_count()
        assert all(q.calibrated and q.step().numel() == heads == 4 for q in found.values())
        got = answers(twin, given)
        errors[bits] = max((a - b).abs().max().item() for a, b in zip(got, expected))
        sum(a.sum() for a in got).backward()  # type: ignore[union-attr]
        with set_mode(twin, "float"):
            assert all(torch.equal(a, b) for a, b in zip(answers(twin, given), expected))
        for q in found.values():  # each of them has its part in the answer
            scale = next(p for p in q.parameters() if p.grad is not None)
            assert scale.grad is not None and scale.grad.any()
    assert errors[16] < 1e-2 * errors[2] and errors[16] < errors[8] < errors[2]


def test_the_deformable_sum_is_that_of_its_quantized_factors() -> None:
    layer, given = deformable("omdet_turbo")
    twin: Any = copy.deepcopy(layer)
    quantize(twin, Plan((("", LayerPlan(operands=TensorPlan(3, "lsq+", symmetric=False))),)), verbose=False)
    calibrate(twin, [given])
    seen: dict[str, Tensor] = {}
    for name in ("probability", "value"):
        getattr(twin, f"{name}_quantizer").register_forward_hook(lambda m, a, y, n=name: seen.update({n: y}))
    out, _ = twin(**given)
    assert seen["probability"].shape == (2, 5, 4, 1, 6) and seen["value"].shape == (2, 5, 4, 6, 4)
    assert seen["value"].unique().numel() <= 8 and seen["probability"].unique().numel() <= 8
    summed = (seen["probability"] @ seen["value"])[..., 0, :].flatten(2)
    torch.testing.assert_close(out, layer.output_proj(summed))  # type: ignore[operator]


def test_a_kernel_that_hides_the_sum_is_told() -> None:
    layer, given = deformable("omdet_turbo")
    layer.attn.forward = lambda value, *_: value.new_zeros(2, 5, 16)  # type: ignore[union-attr, assignment]
    twin = quantize(layer, Plan((("", LayerPlan(operands=TensorPlan(8, "lsq+", symmetric=False))),)), verbose=False)
    with pytest.raises(QuantizationError, match="disable_custom_kernels"):
        twin(**given)
