"""Quantizers: one a file. Each has values, a gradient path and integer codes."""

from fewbits.quantizers.base import QUANTIZERS, Quantizer, make_quantizer, quantizer_class, register_quantizer
from fewbits.quantizers.baselines import BitNet, DynamicSTE, ParetoQ
from fewbits.quantizers.codes import Codes, Grid
from fewbits.quantizers.denoise import Denoise
from fewbits.quantizers.dynamic import Dynamic
from fewbits.quantizers.grouping import Grouping
from fewbits.quantizers.learnable_bits import LearnableBits, project
from fewbits.quantizers.maxabs import MaxAbs
from fewbits.quantizers.n2uq import N2UQ
from fewbits.quantizers.pact import PACT
from fewbits.quantizers.recompute import recomputed
from fewbits.quantizers.released_bits import ReleasedBits
from fewbits.quantizers.requantize import Requantize, Rethreshold
from fewbits.quantizers.uniform import LSQ, LSQPlus, Uniform

__all__ = [
    "LSQ", "N2UQ", "PACT", "QUANTIZERS", "BitNet", "Codes", "Denoise", "Dynamic", "DynamicSTE", "Grid", "Grouping",
    "LSQPlus", "LearnableBits", "MaxAbs", "ParetoQ", "Quantizer", "ReleasedBits", "Requantize", "Rethreshold",
    "Uniform", "make_quantizer", "project", "quantizer_class", "recomputed", "register_quantizer",
]  # fmt: skip
