"""The two quantizers of the PyTorch project: ``torch.ao.quantization`` (in torch) and ``torchao``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .sites import PeerUnavailableError, Prepared, Widths, find_sites, replace, run


def _fake_quantize(bits: int, signed: bool, per_channel: bool) -> Any:
    """Return the constructor of its fastest fake quantizer, ``FusedMovingAvgObsFakeQuantize``."""
    from torch.ao.quantization import (
        FusedMovingAvgObsFakeQuantize,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
    )

    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    scheme = torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric
    return FusedMovingAvgObsFakeQuantize.with_args(
        observer=MovingAveragePerChannelMinMaxObserver if per_channel else MovingAverageMinMaxObserver,
        quant_min=low,
        quant_max=high,
        dtype=torch.qint8 if signed else torch.quint8,
        qscheme=scheme if signed else torch.per_tensor_affine,
        **({"ch_axis": 0} if per_channel else {}),
    )


def _quantize_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    quantizer = layer.get_submodule("input_fake_quant")
    return quantizer(inputs[0])  # type: ignore[no-any-return]


def torch_ao_arm(model: nn.Module, widths: Widths, batches: Sequence[Tensor]) -> Prepared:
    """``torch.ao.nn.qat`` layers with a fake quantizer in front of each; min-max ranges, no learned scale."""
    import torch.ao.nn.qat as nnqat
    from torch.ao.quantization import QConfig

    twins: dict[type[nn.Module], Any] = {nn.Conv2d: nnqat.Conv2d, nn.Linear: nnqat.Linear}
    sites = find_sites(model, widths, batches)
    for site in sites:
        act = _fake_quantize(site.act, site.signed, per_channel=False)
        weight = _fake_quantize(site.weight, signed=True, per_channel=True)
        site.layer.qconfig = QConfig(activation=act, weight=weight)  # type: ignore[assignment]
        twin = twins[type(site.layer)].from_float(site.layer)
        twin.add_module("input_fake_quant", act())
        twin.register_forward_pre_hook(_quantize_input)
        replace(model, site.name, twin)
    run(model, batches)
    return Prepared(model, [s.name for s in sites], {}, "torch.ao.nn.qat layers, FusedMovingAvgObsFakeQuantize")


def torch_ao_fx_arm(model: nn.Module, widths: Widths, batches: Sequence[Tensor]) -> Prepared:
    """``prepare_qat_fx``: traces, fuses batch norm and ReLU, and places the fake quantizers itself."""
    from torch.ao.quantization import QConfig, QConfigMapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    sites = find_sites(model, widths, batches)
    mapping = QConfigMapping().set_global(_qconfig(widths.weight, widths.act, QConfig))
    for site in sites:
        mapping = mapping.set_module_name(site.name, _qconfig(site.weight, site.act, QConfig))
    try:
        model = prepare_qat_fx(model.train(), mapping, (batches[0],))
    except Exception as error:  # its tracer raises many types
        raise PeerUnavailableError(f"prepare_qat_fx cannot trace this model: {error}") from error
    run(model, batches)
    return Prepared(model, [s.name for s in sites], {}, "prepare_qat_fx, FusedMovingAvgObsFakeQuantize")


def _qconfig(weight: int, act: int, qconfig: Any) -> Any:
    return qconfig(
        activation=_fake_quantize(act, signed=False, per_channel=False),
        weight=_fake_quantize(weight, signed=True, per_channel=True),
    )


def torchao_arm(model: nn.Module, widths: Widths, batches: Sequence[Tensor]) -> Prepared:
    """torchao's ``QATConfig``, offered each layer in turn; what it refuses stays float, with its words.

    It has no scale per tensor for activations: theirs are per token, with zero points, anew at each step.
    """
    try:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    except ImportError as error:
        raise PeerUnavailableError(f"torchao: {error}; pip install -r benchmarks/requirements.txt") from error
    refused: dict[str, str] = {}
    sites = find_sites(model, widths, batches)
    for site in sites:
        act = IntxFakeQuantizeConfig(_int_type(site.act), "per_token", is_symmetric=False)
        weight = IntxFakeQuantizeConfig(_int_type(site.weight), "per_channel", is_symmetric=True)
        config = QATConfig(activation_config=act, weight_config=weight, step="prepare")
        try:
            quantize_(model, config, filter_fn=lambda module, _, site=site: module is site.layer)
        except (ValueError, NotImplementedError) as error:
            refused[site.name] = str(error)
    if len(refused) == len(sites):
        raise PeerUnavailableError(f"torchao quantizes no layer of this model: {next(iter(refused.values()))}")
    quantized = [s.name for s in sites if s.name not in refused]
    return Prepared(model, quantized, refused, "QATConfig, per-token dynamic activations, per-channel weights")


def _int_type(bits: int) -> torch.dtype:
    return getattr(torch, f"int{bits}")  # type: ignore[no-any-return]
