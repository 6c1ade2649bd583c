"""Export a packed model to ONNX that stock engines run with the same answers.

Rules, one a case (docs/deployment.md tells why):

* a convolution, or a linear layer with a quantized input: INT8 weights, unsigned 8-bit Q/DQ on the activation,
  whatever the trained width; exact, and what engines run fast ("INT8 box");
* a linear layer with a float input: INT2, INT4 or INT8 weights, the narrowest that holds the codes;
* mode "smallest": every weight at the narrowest type, where channels differ in width each of them; activations
  fake-quantized in float operators.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.deploy.onnx_graph import finish_graph
from fewbits.deploy.onnx_inputs import emit_quantizer
from fewbits.deploy.onnx_mixed import EmitMixed
from fewbits.deploy.onnx_nodes import EmitWeight, emit_layer, refine_for_bias
from fewbits.deploy.packed import PackedLayer, PackedWeight, packed_class
from fewbits.errors import ExportError, FewbitsError
from fewbits.layers import quantized_layers
from fewbits.layers.twins import SpatialTwin
from fewbits.quantizers import Codes, Quantizer, Uniform

OPSET = 21  # the first with blocked DequantizeLinear and INT4
OPSET_INT2 = 25
MODES = ("fastest", "smallest")


@dataclass(frozen=True)
class ExportReport:
    """What was written: bytes of the file, its opset and mode, and the weight type of each layer ("INT2+INT8" where its
    channels have several)."""

    path: Path
    file_bytes: int
    opset: int
    mode: str
    weight_types: dict[str, str]


def export_onnx(
    packed: nn.Module, path: str | Path, example: Any, *, mode: str = "fastest", dynamic_batch: bool = True
) -> ExportReport:
    """Write a packed model as ONNX and return what was written.

    example: a batch (tensor, or tuple or dict of arguments), whose first axis stays free if dynamic_batch. Raises
    ExportError for an unknown mode, a model that is not packed, or one that PyTorch cannot export.
    """
    if mode not in MODES:
        raise ExportError(f"mode must be one of {MODES}, got {mode!r}")
    if not any(isinstance(layer, PackedLayer) for layer in quantized_layers(packed).values()):
        raise ExportError("export_onnx takes a packed model: call fewbits.pack(model, example) first")
    emitting, example = copy.deepcopy(packed).eval().cpu(), _on_cpu(example)
    weights = _emit(emitting, mode)
    kinds = {f"{name}.packed.{part}": kind for name, w in weights.items() for part, kind in w.stored().items()}
    opset = OPSET_INT2 if any(kind.endswith("INT2") for kind in kinds.values()) else OPSET
    proto = trace(emitting, example, opset, dynamic_batch)
    finish_graph(proto, kinds, short=mode == "smallest")
    write(proto, path)
    types = {name: weight.kind for name, weight in weights.items()}
    return ExportReport(Path(path), Path(path).stat().st_size, opset, mode, types)


def export_float(model: nn.Module, path: str | Path, example: Any, *, dynamic_batch: bool = True) -> Path:
    """Write a float model as ONNX, for comparison."""
    write(trace(copy.deepcopy(model).eval(), example, OPSET, dynamic_batch), path)
    return Path(path)


def trace(model: nn.Module, example: Any, opset: int, dynamic_batch: bool) -> Any:
    """Run PyTorch's exporter; return the ONNX model proto."""
    import logging

    args = (example,) if isinstance(example, Tensor) else _map(example, lambda a: a)  # as ``call`` does it
    if dynamic_batch:  # a batch of one would be taken for a constant
        args = _map(args, lambda a: torch.cat([a, a]) if isinstance(a, Tensor) and a.shape[:1] == (1,) else a)
    batch = torch.export.Dim("batch")
    free = _map(args, lambda a: {0: batch} if isinstance(a, Tensor) and a.ndim else None)
    given: Any = {"kwargs": args} if hasattr(args, "keys") else {"args": args}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                **given,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=free if dynamic_batch else None,
                verbose=False,
            )
    except Exception as error:
        own = _own(error)
        if own is not None:
            raise ExportError(str(own)) from error
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter's own message is advice, and says nothing of the reason
            cause = cause.__cause__
        reason = str(cause).strip().splitlines()
        raise ExportError(
            f"PyTorch could not export this model to ONNX ({reason[0] if reason else type(cause).__name__}); "
            "does the float model export, and with dynamic_batch=False?"
        ) from error
    finally:
        logger.setLevel(level)
    assert program is not None
    return program.model_proto


def _on_cpu(example: Any) -> Any:
    """Return an example where the exporter works: what the quantizers become is made there."""
    if isinstance(example, Tensor):
        return example.cpu()
    return _map(example, lambda a: a.cpu() if isinstance(a, Tensor) else a)


def _own(error: BaseException | None) -> FewbitsError | None:
    """Return the error of ours that PyTorch's exporter has wrapped, if there is one."""
    while error is not None and not isinstance(error, FewbitsError):
        error = error.__cause__ or error.__context__
    return error


def _map(args: Any, f: Callable[[Any], Any]) -> Any:
    """Apply f to each of a tuple or dict of arguments."""
    return {k: f(a) for k, a in args.items()} if hasattr(args, "keys") else tuple(f(a) for a in args)


def write(proto: Any, path: str | Path) -> None:
    """Write a proto, whole or not at all."""
    partial = Path(f"{path}.partial")
    try:
        partial.write_bytes(proto.SerializeToString())
        partial.replace(path)
    except (OSError, ValueError) as error:
        raise ExportError(f"cannot write {str(path)!r}: {error}") from error


def _emit(model: nn.Module, mode: str) -> dict[str, EmitWeight | EmitMixed]:
    """Replace quantizers and packed weights by what they become in ONNX; return the weights by their first layer."""
    first: dict[str, EmitWeight | EmitMixed] = {}
    emitted: dict[PackedWeight, EmitWeight | EmitMixed] = {}
    layers = {name: layer for name, layer in quantized_layers(model).items() if isinstance(layer, PackedLayer)}
    tables = {layer.packed for layer in layers.values() if not layer.is_linear}  # linear layers may share them
    for name, layer in layers.items():
        weight = layer.packed
        linear = layer.is_linear and weight not in tables
        boxed = isinstance(layer.input_quantizer, Uniform) or not linear
        if weight not in emitted:
            emitted[weight] = first[name] = _emitted(layer, mode, boxed=boxed, linear=linear)
        del layer.packed
        layer.packed = emitted[weight]  # type: ignore[assignment]
        layer.__class__ = packed_class(layer.float_class)  # also where it multiplied integers
        if linear:
            emit_layer(layer)
    for parent in list(model.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, Quantizer) and (module.calibrated or module.dynamic):  # else unused, or it says so
                setattr(parent, child, emit_quantizer(module, mode == "fastest"))
    return first


def _emitted(layer: PackedLayer, mode: str, *, boxed: bool, linear: bool) -> EmitWeight | EmitMixed:
    """Return what the weight of a layer becomes."""
    weight = layer.packed
    if mode == "smallest" and weight.channel_bits is not None:
        return EmitMixed(weight.get(), weight.channel_bits, contraction_first=linear)
    kind = weight_type(weight, boxed, mode, weight.shape[layer.channel_axis] if linear else 0)
    return EmitWeight(_codes(layer, kind), kind=kind, contraction_first=linear)


def _codes(layer: PackedLayer, kind: str) -> Codes:
    """Return the codes to emit."""
    codes, activation = layer.packed.get(), layer.input_quantizer
    convolves = isinstance(layer, SpatialTwin)
    if kind == "INT8" and convolves and layer.bias is not None and isinstance(activation, Uniform):
        return refine_for_bias(codes, layer.bias.detach(), activation)
    return codes


def weight_type(weight: PackedWeight, boxed: bool, mode: str, outputs: int = 0) -> str:
    """Return INT2, INT4 or INT8: the box for integer engines, or the narrowest type that holds the codes.

    outputs: of a linear layer. ONNX Runtime (1.31) fuses INT2 weights into a kernel that answers wrongly unless
    outputs divide by 4; those get INT4.
    """
    grid = weight.grid
    if mode == "fastest" and boxed:
        return "INT8"
    shift = 0 if grid.lowest < 0 else 2 ** (grid.bits - 1)  # unsigned codes have unsigned types
    lowest, highest = grid.lowest - shift, grid.highest - shift
    if grid.step == 2 and mode == "smallest" and weight.sparsity is None:  # odd codes 2 q + 1 are stored as q
        lowest, highest = (lowest - 1) // 2, (highest - 1) // 2
    for bits in (2, 4) if outputs % 4 == 0 else (4,):
        if -(2 ** (bits - 1)) <= lowest and highest < 2 ** (bits - 1):
            return f"INT{bits}"
    return "INT8"
