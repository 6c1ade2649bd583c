"""Quantized twins of layers, and swapping them in and out."""

from fewbits.layers import attention, twins
from fewbits.layers.base import QuantizedLayer, quantizes, twin_class
from fewbits.layers.intercept import register_attention, wrap_owners
from fewbits.layers.swap import (
    activation_quantizers,
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

__all__ = [
    "QuantizedLayer", "activation_quantizers", "attention", "calibrate", "call", "dequantize", "describe",
    "float_class", "in_eval", "print_table", "quantizable", "quantize", "quantized_layers", "quantizes",
    "register_attention", "report_layers", "set_mode", "twin_class", "twins", "wrap_owners",
]  # fmt: skip
