"""Find the layers that see values below zero: a quantizer that starts at zero would cut them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbits.layers.swap import call, in_eval, quantizable


def signed_inputs(model: nn.Module, example: Any, least: float) -> list[str]:
    """Return the names of quantizable layers whose first input goes below -``least`` times its largest magnitude.

    example: a batch, as for ``calibrate``; one forward on it shows it.
    """
    found: dict[str, bool] = {}

    def look(name: str, args: Any) -> None:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point() and args[0].numel():
            low, high = float(args[0].min()), float(args[0].max())
            found[name] = found.get(name, False) or -low > least * max(high, -low)

    layers = quantizable(model)
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: look(name, args))
        for name, layer in layers.items()
    ]
    try:
        with in_eval(model), torch.no_grad():
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in layers if found.get(name)]
