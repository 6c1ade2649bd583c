"""A small model, and functions that train and measure it as if: the accuracy follows from the bits alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.allocate import Budget, SearchResult, Style, sigma_search
from fewbits.layers.swap import quantized_layers

BATCHES = [torch.linspace(-1, 1, 96).reshape(16, 6).roll(k, 1) for k in range(2)]
FREE = Style(act_bits=8, first_last=None, range="minmax")
SHORT: dict[str, Any] = {"epochs_reference": 1, "epochs_cluster": 1, "epochs_refine": 1, "steps": 12, "rounds": 2}


def deep(layers: int = 9, seed: int = 0) -> nn.Sequential:
    """Return linear layers, each with a batch norm; sigma and width differ from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    widths = [6, *(4 + int(n) for n in torch.randint(0, 20, (layers - 1,), generator=generator)), 3]
    parts: list[nn.Module] = []
    for inside, outside in itertools.pairwise(widths):
        layer = nn.Linear(inside, outside)
        with torch.no_grad():
            scale = float((1.5 * torch.randn((), generator=generator)).exp())
            layer.weight.copy_(scale * torch.randn(layer.weight.shape, generator=generator))
            layer.bias.zero_()
        parts += [layer, nn.BatchNorm1d(outside), nn.ReLU()]
    return nn.Sequential(*parts[:-2])


def bits_of(model: nn.Module) -> dict[str, int]:
    """Return the weight bits of the quantized layers."""
    found = {name: layer.layer_plan.weight for name, layer in quantized_layers(model).items()}
    return {name: weight.bits for name, weight in found.items() if weight is not None}


def disturb(model: nn.Module, epochs: int) -> None:
    """Train as if: move every weight a little, and the statistics of norms, as the global generator says."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * epochs * torch.randn(parameter.shape))
        for batch in BATCHES:
            model(batch + 0.1 * torch.randn(batch.shape))


class Accuracy:
    """90 %, less a loss for each layer that halves with each bit; ``fails`` may raise or return another number."""

    def __init__(self, seed: int = 0, scale: float = 8.0, fails: Callable[[int], float | None] | None = None) -> None:
        self.generator, self.scale, self.fails = torch.Generator().manual_seed(seed), scale, fails
        self.weight: dict[str, float] = {}
        self.calls, self.states = 0, list[dict[str, Any]]()

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        if self.fails is not None and (answer := self.fails(self.calls)) is not None:
            return answer
        self.states.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in model.state_dict().items()})
        loss = 0.0
        for name, bits in bits_of(model).items():
            if name not in self.weight:
                self.weight[name] = self.scale * float(torch.rand((), generator=self.generator)) ** 2
            loss += self.weight[name] * 2.0 ** (2 - bits)
        return 90.0 - loss


def searched(budget: Budget, accuracy: Accuracy | None = None, layers: int = 9, **options: Any) -> SearchResult:
    """Run a search on the small model."""
    style = options.pop("style", FREE)
    return sigma_search(
        options.pop("model", None) or deep(layers),
        budget,
        options.pop("finetune", disturb),
        accuracy or Accuracy(),
        BATCHES,
        example=options.pop("example", BATCHES[0]),
        style=style,
        **{**SHORT, **options},
    )


def equal_states(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Tell whether two state dicts hold the same bits."""
    return one.keys() == two.keys() and all(
        torch.equal(one[k], two[k]) if isinstance(one[k], Tensor) else one[k] == two[k] for k in one
    )
