"""What a plan costs: pure functions of (plan, shape of the model)."""

from fewbits.cost.bops import bops, layer_bops
from fewbits.cost.breakdown import HardwareCost, LayerCost, hardware_cost
from fewbits.cost.cycles import code_cycles, multiplier_codes, plan_cycles, weight_cycles
from fewbits.cost.engines import MacArray, Roofline
from fewbits.cost.hardware import (
    Hardware,
    LayerEnergy,
    Memory,
    hardware_names,
    layer_energies,
    layer_energy,
    layer_latency,
)
from fewbits.cost.prices import BitPrices, bit_prices
from fewbits.cost.shapes import LayerShape, ModelShape, float_bytes, model_shape, require_layers
from fewbits.cost.shift_add import MacResult, int8_mac, shift_add_mac
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
    "BitPrices",
    "Hardware",
    "HardwareCost",
    "LayerCost",
    "LayerEnergy",
    "LayerShape",
    "LayerSize",
    "MacArray",
    "MacResult",
    "Memory",
    "ModelShape",
    "Roofline",
    "Size",
    "arithmetic_bits",
    "average_weight_bits",
    "bit_prices",
    "bops",
    "code_cycles",
    "fixed_bytes",
    "float_bytes",
    "hardware_cost",
    "hardware_names",
    "int8_mac",
    "layer_bops",
    "layer_energies",
    "layer_energy",
    "layer_latency",
    "layer_size",
    "model_shape",
    "multiplier_codes",
    "plan_cycles",
    "require_layers",
    "shift_add_mac",
    "size",
    "stored_bits",
    "weight_bits",
    "weight_cycles",
]  # fmt: skip
