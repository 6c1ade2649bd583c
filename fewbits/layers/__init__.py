"""Quantized twins of layers, and swapping them in and out."""

from fewbits.layers import attention, twins
from fewbits.layers.base import QuantizedLayer, activation_quantizers, quantizes, twin_class
from fewbits.layers.ends import open_ends
from fewbits.layers.intercept import register_attention, wrap_owners
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
    "QuantizedLayer", "Watch", "activation_quantizers", "attention", "calibrate", "call", "dequantize", "describe",
    "float_class", "in_eval", "open_ends", "print_table", "quantizable", "quantize", "quantized_layers", "quantizes",
    "register_attention", "report_layers", "set_mode", "twin_class", "twins", "wrap_owners",
]  # fmt: skip
