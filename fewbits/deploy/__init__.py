"""Deployment: pack to integers, save and load, export to ONNX, verify."""

from fewbits.deploy.align import align_biases
from fewbits.deploy.file import load, save
from fewbits.deploy.integer import run_in_integers
from fewbits.deploy.onnx_export import ExportReport, export_float, export_onnx
from fewbits.deploy.pack import code_mismatches, pack
from fewbits.deploy.packed import PackedLayer, PackedWeight
from fewbits.deploy.verify import VerifyReport, verify

__all__ = [
    "ExportReport", "PackedLayer", "PackedWeight", "VerifyReport", "align_biases", "code_mismatches", "export_float",
    "export_onnx", "load", "pack", "run_in_integers", "save", "verify",
]  # fmt: skip
