"""What a plan costs: pure functions of (plan, shape of the model)."""

from fewbits.cost.bops import bops, layer_bops
from fewbits.cost.breakdown import HardwareCost, LayerCost, hardware_cost
from fewbits.cost.cycles import code_cycles, multiplier_codes, plan_cycles, weight_cycles
from fewbits.cost.hardware import (
    Hardware,
    LayerEnergy,
    Memory,
    hardware_names,
    layer_energies,
    layer_energy,
    layer_latency,
)
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
    "Hardware", "HardwareCost", "LayerCost", "LayerEnergy", "LayerShape", "LayerSize", "Memory", "ModelShape", "Size",
    "arithmetic_bits", "average_weight_bits", "bops", "code_cycles", "fixed_bytes", "float_bytes", "hardware_cost",
    "hardware_names", "layer_bops", "layer_energies", "layer_energy", "layer_latency", "layer_size", "model_shape",
    "multiplier_codes", "plan_cycles", "require_layers", "size", "stored_bits", "weight_bits", "weight_cycles",
]  # fmt: skip
