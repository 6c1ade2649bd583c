"""Sensitivity by measurement: what the loss does when one layer alone is quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.allocate.sensitivity import (
    Menu,
    QuantizeError,
    checked_loss,
    layer_error,
    own_layers,
    own_weights,
    probing,
    style_error,
    widths_of,
)
from fewbits.allocate.style import Style
from fewbits.errors import DataError


def measured(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    menu: Menu,
    *,
    quantize_error: QuantizeError | None = None,
) -> dict[str, list[float]]:
    """Return by how much the mean loss over ``batches`` rises when one layer's weight alone has a width.

    One pass over the batches a layer and width, and one in float; batches are kept in memory. The rise can be below
    zero. The model runs in float and in eval mode, without gradients; mode and weights are as before afterwards, bit
    for bit, also where the loss raises. Raises DataError if there are no batches or a loss is not finite, naming
    layer and width. Other arguments: as of ``fisher``.
    """
    kept, weights = list(batches), own_weights(model)
    if not kept:
        raise DataError("measured sensitivity needs at least one batch, got none")
    error, found = quantize_error or style_error(Style()), dict[str, list[float]]()
    with probing(model, ()), torch.no_grad():
        before = _mean_loss(model, kept, loss, "in float")
        for name, layer in own_layers(model).items():
            weight = weights[name]
            original = weight.detach().clone()
            found[name] = []
            for bits in widths_of(menu, name):
                try:
                    weight.copy_(original + layer_error(error, name, layer, original, bits))
                    after = _mean_loss(model, kept, loss, f"with layer {name!r} at {bits} bits")
                finally:
                    weight.copy_(original)
                found[name].append(after - before)
    return found


def _mean_loss(model: nn.Module, batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor], when: str) -> float:
    values = [float(checked_loss(loss, model, batch, n, when)) for n, batch in enumerate(batches, start=1)]
    return math.fsum(values) / len(values)
