"""Deployment: pack to integers, save and load, export to ONNX, verify."""

from fewbits.deploy.align import align_biases
from fewbits.deploy.file import load, save
from fewbits.deploy.fold_fusion import FusionAccuracy, calibrate_fusion, fix_fusion, fold_and_measure, fold_fusion
from fewbits.deploy.integer import run_in_integers
from fewbits.deploy.onnx_export import ExportReport, export_float, export_onnx
from fewbits.deploy.pack import code_mismatches, pack
from fewbits.deploy.packed import PackedLayer, PackedWeight
from fewbits.deploy.verify import VerifyReport, verify

__all__ = [
    "ExportReport", "FusionAccuracy", "PackedLayer", "PackedWeight", "VerifyReport", "align_biases", "calibrate_fusion",
    "code_mismatches", "export_float", "export_onnx", "fix_fusion", "fold_and_measure", "fold_fusion", "load", "pack",
    "run_in_integers", "save", "verify",
]  # fmt: skip
