"""Brevitas through its quantized layers (``QuantConv2d``, ``QuantLinear``), put in by its own rewriter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .sites import PeerUnavailableError, Prepared, Site, Widths, find_sites, run


def brevitas_arm(model: nn.Module, widths: Widths, batches: Sequence[Tensor], *, learned: bool) -> Prepared:
    """Quantize with the ready-made per-channel weight and per-tensor activation quantizers of Brevitas.

    learned=False: those of its tutorials. Weight scale from the largest weight of the channel, followed at
    each step with its gradient; activation scale learned, starting at the 99.999th percentile.
    learned=True: its ``...FloatMSE`` quantizers. Both scales are learned, from the least squared error on.

    At two bits the weight range is the full one, four codes instead of its default three. One-bit weights:
    see :func:`_binary_weight`.
    """
    try:
        import brevitas.config
        import brevitas.nn as qnn
        from brevitas.graph.base import ModuleToModuleByInstance
        from brevitas.graph.calibrate import calibration_mode
    except ImportError as error:
        raise PeerUnavailableError(f"brevitas: {error}; pip install -r benchmarks/requirements.txt") from error
    twins: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: qnn.QuantConv2d, nn.Linear: qnn.QuantLinear}
    sites = find_sites(model, widths, batches)
    brevitas.config.IGNORE_MISSING_KEYS = True  # its own switch for loading float weights into quantized layers
    for site in sites:
        kwargs = {"weight_quant": _weight(site, learned), "input_quant": _act(site, learned)}
        model = ModuleToModuleByInstance(site.layer, twins[type(site.layer)], **kwargs).apply(model)
    model.eval()
    with torch.no_grad(), calibration_mode(model):  # puts its quantizers, and nothing else, into training mode
        for batch in batches:
            model(batch)
        _require_statistics(model)
    run(model, batches[:1])  # weight scales are initialized by the first quantized forward
    names = [site.name for site in sites]
    return Prepared(model, names, {}, _setup(sites, learned), partial(_groups, model))


def _require_statistics(model: nn.Module) -> None:
    """Raise RuntimeError where an activation quantizer has seen no batch: its scale would stay at 1, silently."""
    for name, module in model.named_modules():
        if hasattr(module, "collect_stats_steps") and not module.counter:
            raise RuntimeError(
                f"{name!r} collected no statistics: was the model put into eval inside calibration_mode?"
            )


def _groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups: learned scales apart, without weight decay."""
    named = list(model.named_parameters())
    scales = [p for name, p in named if "scaling_impl" in name]
    others = [p for name, p in named if "scaling_impl" not in name]
    return [
        {"params": others, "lr": lr, "weight_decay": weight_decay},
        {"params": scales, "lr": lr, "weight_decay": 0.0},
    ]


def _act(site: Site, learned: bool) -> Any:
    from brevitas import quant

    name = f"{'Int8' if site.signed else 'Uint8'}ActPerTensorFloat{'MSE' if learned else ''}"
    return getattr(quant, name).let(bit_width=site.act)


def _weight(site: Site, learned: bool) -> Any:
    from brevitas import quant

    if site.weight == 1:
        return _binary_weight(learned)
    name = f"Int8WeightPerChannelFloat{'MSE' if learned else ''}"
    return getattr(quant, name).let(bit_width=site.weight, narrow_range=site.weight > 2)


def _binary_weight(learned: bool) -> Any:
    """Binary weights with one scale a channel: the mean absolute weight, followed (or learned from there).

    Composed of the library's own parts, as its documentation shows: the one binary weight quantizer that it
    ships has a constant scale of 0.1 for the whole tensor and loses many points.
    """
    from brevitas.inject.enum import (
        QuantType,
        RestrictValueType,
        ScalingImplType,
        ScalingPerOutputType,
        StatsOp,
    )
    from brevitas.quant.solver import WeightQuantSolver

    class BinaryWeightPerChannelMeanAbs(WeightQuantSolver):  # type: ignore[misc]
        quant_type = QuantType.BINARY
        signed = True
        narrow_range = True
        bit_width = 1
        scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS if learned else ScalingImplType.STATS
        scaling_stats_op = StatsOp.AVE
        scaling_per_output_type = ScalingPerOutputType.CHANNEL
        restrict_scaling_type = RestrictValueType.FP
        scaling_min_val = 1e-10

    return BinaryWeightPerChannelMeanAbs


def _setup(sites: Sequence[Site], learned: bool) -> str:
    def name(quantizer: Any) -> str:  # `.let(...)` makes a subclass of the same name
        return str(quantizer.__name__)

    return ", ".join(sorted({name(q) for s in sites for q in (_weight(s, learned), _act(s, learned))}))
