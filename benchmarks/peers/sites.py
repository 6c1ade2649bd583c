"""What every arm is asked to quantize: the weight and the input of each convolution and linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

LAYER_TYPES = (nn.Conv2d, nn.Linear)


class PeerUnavailableError(RuntimeError):
    """An arm whose library is not installed, or that has nothing to offer for this model and these widths."""


@dataclass(frozen=True)
class Widths:
    """Bits of weights and activations; first_last: of the first and the last layer (None: as the others). sparsity: N:M
    of all other weights, for arms that can do it."""

    weight: int
    act: int
    first_last: int | None = 8
    sparsity: str | None = None

    def __str__(self) -> str:
        return f"W{self.weight}A{self.act}"


@dataclass(frozen=True)
class Site:
    """One layer to quantize: the widths of its weight and input, and whether that input is ever negative."""

    name: str
    layer: nn.Module
    weight: int
    act: int
    signed: bool


@dataclass
class Prepared:
    """A model that one arm made ready for training, and what the arm did.

    quantized: names of the layers. left_in_float: name -> reason. setup: the library's own settings, for the
    record. groups: (lr, weight_decay) -> parameter groups, where the library has its own idea of them.
    """

    model: nn.Module
    quantized: list[str]
    left_in_float: dict[str, str]
    setup: str = ""
    groups: Callable[[float, float], list[dict[str, Any]]] | None = field(default=None, repr=False)


Arm = Callable[[nn.Module, Widths, Sequence[Tensor]], Prepared]


def find_sites(model: nn.Module, widths: Widths, batches: Sequence[Tensor]) -> list[Site]:
    """Return the layers to quantize in the order in which they run, with the signs seen on ``batches``."""
    lowest: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            lowest[name] = min(lowest.get(name, 0.0), inputs[0].min().item())

        return hook

    layers = {name: module for name, module in model.named_modules() if type(module) in LAYER_TYPES}
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    run(model, batches)
    for handle in handles:
        handle.remove()
    ran = list(lowest)
    found = []
    for name in ran:
        edge = widths.first_last if name in (ran[0], ran[-1]) else None
        found.append(Site(name, layers[name], edge or widths.weight, edge or widths.act, lowest[name] < 0))
    return found


@torch.no_grad()
def run(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Run the batches in evaluation mode, without gradients; leave the model in the mode it was in."""
    was_training = model.training
    model.eval()
    for batch in batches:
        model(batch)
    model.train(was_training)


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the submodule ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
