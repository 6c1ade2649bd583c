"""Quantized twins of layers, and swapping them in and out."""

from fewbits.layers import attention, detr_attention, twins
from fewbits.layers.balance import balance_fusion, remove_fusion
from fewbits.layers.base import QuantizedLayer, activation_quantizers, quantizes, twin_class
from fewbits.layers.ends import open_ends
from fewbits.layers.fusion import BalancedFusion, FusionSettings, fusion_nodes
from fewbits.layers.fusion_control import freeze_fusion, fusion_numbers, update_fusion
from fewbits.layers.fusion_sites import FusionSite, find_sites
from fewbits.layers.intercept import register_attention, wrap_owners
from fewbits.layers.settle import reestimate_batch_norms, settle_fusion
from fewbits.layers.settle_bits import settle_bits
from fewbits.layers.swap import (
    calibrate,
    call,
    dequantize,
    describe,
    float_class,
    in_eval,
    print_table,
    quantizable,
    quantize,
    quantized_layers,
    report_layers,
    set_mode,
)  # fmt: skip
from fewbits.layers.watch import Watch

__all__ = [
    "BalancedFusion", "FusionSettings", "FusionSite", "QuantizedLayer", "Watch", "activation_quantizers", "attention",
    "balance_fusion", "calibrate", "call", "dequantize", "describe", "detr_attention", "find_sites", "float_class",
    "freeze_fusion", "fusion_nodes", "fusion_numbers", "in_eval", "open_ends", "print_table", "quantizable", "quantize",
    "quantized_layers", "quantizes", "reestimate_batch_norms", "register_attention", "remove_fusion", "report_layers",
    "set_mode", "settle_bits", "settle_fusion", "twin_class", "twins", "update_fusion", "wrap_owners",
]  # fmt: skip
