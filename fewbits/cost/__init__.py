"""What a plan costs: pure functions of (plan, shape of the model)."""

from fewbits.cost.bops import bops, layer_bops
from fewbits.cost.shapes import LayerShape, ModelShape, float_bytes, model_shape, require_layers
from fewbits.cost.size import (
    LayerSize,
    Size,
    arithmetic_bits,
    average_weight_bits,
    fixed_bytes,
    layer_size,
    size,
    stored_bits,
    weight_bits,
)

__all__ = [
    "LayerShape", "LayerSize", "ModelShape", "Size", "arithmetic_bits", "average_weight_bits", "bops", "fixed_bytes",
    "float_bytes", "layer_bops", "layer_size", "model_shape", "require_layers", "size", "stored_bits", "weight_bits",
]  # fmt: skip
