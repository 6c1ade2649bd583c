"""After fusion nodes were put into a trained float model: let it find its feet again, before it is quantized."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import QuantizationError
from fewbits.layers.consumers import NORMS, Consumers, find_consumers
from fewbits.layers.fusion import BalancedFusion, fusion_nodes
from fewbits.layers.swap import call, in_eval, quantized_layers


def settle_fusion(model: nn.Module, batches: Iterable[Any]) -> dict[str, str]:
    """Undo, in place, what the norms of new fusion nodes did to a float model; return what was done for each node.

    Where a batch norm follows each layer behind a node, the statistics of all batch norms are taken anew (about 100
    batches are enough). Elsewhere the layers behind the node are scaled once by the mean statistics of h:
    W <- s W and b <- b + m sum(W), with m and s of h before the norm and the gains undone: the inverse
    of the fold at deployment (exact for constant statistics and 1x1 kernels). Run it before ``quantize``: raises
    QuantizationError for a model with quantized layers, and without batches.
    """
    kept = list(batches)
    if not kept:
        raise QuantizationError("settle_fusion needs at least one batch, got none")
    if quantized_layers(model):
        raise QuantizationError("settle_fusion moves float weights: call it before quantize")
    done: dict[str, str] = {}
    nodes, stale = fusion_nodes(model), False
    for name, consumers in find_consumers(model, kept[0]).items():
        if not nodes[name].settings.norm:
            done[name] = "left alone: it has no norm"
        elif consumers.layers and set(consumers.norms) == set(consumers.layers):
            done[name], stale = "batch norms estimated anew", True
        elif not consumers.layers or consumers.other or consumers.shared:
            done[name] = f"left alone: its result goes to {consumers.other + consumers.shared}, not to layers only"
        else:
            if stale:  # else what is measured now is not what will be there in the end
                reestimate_batch_norms(model, kept)
            _rescale(model, nodes[name], consumers, kept)
            done[name] = f"weights rescaled: {', '.join(consumers.layers)}"
    if "batch norms estimated anew" in done.values():
        reestimate_batch_norms(model, kept)
    return done


def reestimate_batch_norms(model: nn.Module, batches: Iterable[Any]) -> None:
    """Take the running statistics of every batch norm anew, as the plain mean over the batches, in place."""
    norms = [m for m in model.modules() if isinstance(m, NORMS) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    with in_eval(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
            norm.train()
        for batch in batches:
            call(model, batch)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def _rescale(model: nn.Module, node: BalancedFusion, consumers: Consumers, batches: Sequence[Any]) -> None:
    """Let the layers behind a node do what they did to the branches as they were: F = (std LN(h) + mean) / a."""
    mean, std = measure_statistics(model, node, batches)
    inverse = 1.0 / channel_gains(node, consumers.widths)
    with torch.no_grad():
        for name in consumers.layers:
            layer: Any = model.get_submodule(name)
            shift = mean * input_sums(layer, inverse)
            layer.weight.mul_(std * spread_gains(layer, inverse))
            if layer.bias is None:
                layer.bias = nn.Parameter(shift.to(layer.weight.dtype))
            else:
                layer.bias.add_(shift)


def channel_gains(node: BalancedFusion, widths: Sequence[int]) -> Tensor:
    """Return the gain of each channel of what a node returns; of an add, the mean gain of its branches."""
    gains = node.gains.detach()
    if node.op == "add":
        return gains.mean().expand(widths[0])
    return gains.repeat_interleave(torch.tensor(widths, device=gains.device))


def measure_statistics(model: nn.Module, node: BalancedFusion, batches: Iterable[Any]) -> tuple[float, float]:
    """Return mean and std of what the norm of a node gets, each the mean over samples and places, in eval mode."""
    totals = torch.zeros(3, dtype=torch.float64)

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        mean, std = node.statistics(node.fuse(args[0]).float())
        totals.add_(torch.tensor([float(mean.double().sum()), float(std.double().sum()), mean.numel()]))

    with in_eval(model), torch.no_grad(), _hooked(node, note):
        for batch in batches:
            call(model, batch)
    if not totals[2]:
        raise QuantizationError(f"{node.label}: no batch reached it: give batches that do, or remove the node")
    return float(totals[0] / totals[2]), float(totals[1] / totals[2])


@contextlib.contextmanager
def _hooked(node: nn.Module, hook: Any) -> Iterator[None]:
    handle = node.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def input_sums(layer: Any, gains: Tensor) -> Tensor:
    """Return the sum over the weights of each output channel, [out], with a factor for each input channel, [in]."""
    weight: Tensor = layer.weight * spread_gains(layer, gains)
    if _is_transposed(layer):  # [in, out / groups, ...]
        weight = weight.reshape(layer.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1).sum(1).detach()


def spread_gains(layer: Any, gains: Tensor) -> Tensor:
    """Shape one factor an input channel, [in], so that it broadcasts over the weight of a layer."""
    weight: Tensor = layer.weight
    groups = int(getattr(layer, "groups", 1))
    if _is_transposed(layer):
        return gains.reshape(-1, *[1] * (weight.ndim - 1))
    rows = gains.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return rows.reshape(len(weight), -1, *[1] * (weight.ndim - 2))


def _is_transposed(layer: Any) -> bool:
    return isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
