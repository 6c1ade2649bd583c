"""fewbits: neural networks on few bits. Allocate, quantize, train, pack, verify, run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fewbits.plan import LayerPlan, Plan, TensorPlan

if TYPE_CHECKING:
    from fewbits.allocate import Budget, allocate, sigma_search, uniform_plan
    from fewbits.deploy import align_biases, export_onnx, fold_fusion, load, pack, save, verify
    from fewbits.layers import FusionSettings, balance_fusion, calibrate, dequantize, quantize, settle_fusion
    from fewbits.train import FitConfig, fit

__version__ = "0.1.0"

_LAZY = {  # imported on first use, so that ``import fewbits`` and ``fewbits --help`` stay quick
    "Budget": "allocate", "allocate": "allocate", "sigma_search": "allocate", "uniform_plan": "allocate",
    "align_biases": "deploy", "export_onnx": "deploy", "fold_fusion": "deploy", "load": "deploy", "pack": "deploy",
    "save": "deploy", "verify": "deploy",
    "FusionSettings": "layers", "balance_fusion": "layers", "calibrate": "layers", "dequantize": "layers",
    "quantize": "layers", "settle_fusion": "layers",
    "FitConfig": "train", "fit": "train",
}  # fmt: skip

__all__ = [
    "Budget", "FitConfig", "FusionSettings", "LayerPlan", "Plan", "TensorPlan", "align_biases", "allocate",
    "balance_fusion", "calibrate", "dequantize", "export_onnx", "fit", "fold_fusion", "load", "pack", "quantize",
    "save", "settle_fusion", "sigma_search", "uniform_plan", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fewbits' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fewbits.{_LAZY[name]}"), name)
    globals()[name] = value  # also where a subpackage has the same name: fewbits.allocate is the function
    return value
