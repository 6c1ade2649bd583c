"""Quantizers: one a file. Each has values, a gradient path and integer codes."""

from fewbits.quantizers.base import QUANTIZERS, Quantizer, make_quantizer, register_quantizer
from fewbits.quantizers.codes import Codes, Grid
from fewbits.quantizers.fake_quantize import recomputed
from fewbits.quantizers.grouping import Grouping
from fewbits.quantizers.uniform import LSQ, LSQPlus, Uniform

__all__ = [
    "LSQ", "QUANTIZERS", "Codes", "Grid", "Grouping", "LSQPlus", "Quantizer", "Uniform", "make_quantizer",
    "recomputed", "register_quantizer",
]  # fmt: skip
