"""What decides where a search starts and which layer it moves next: divergence (SigmaQuant), or Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from fewbits.allocate.clusters import cluster_bits
from fewbits.allocate.layout import INT8, Layout
from fewbits.allocate.rank import divergences, item_sigmas, ranked, sample_inputs
from fewbits.allocate.search_settings import SearchSettings
from fewbits.allocate.sensitivity import fisher, style_error
from fewbits.errors import PlanError

Loss = Callable[[nn.Module, Any], Tensor]


class Ranker(Protocol):
    """name: of the method. rounds: of phase 1 that differ from each other, at most. inputs: samples of the inputs whose
    width moves, by layer. sigmas: standard deviation of each item.
    """

    name: str
    rounds: int
    inputs: dict[str, Tensor]
    sigmas: list[float]

    def look(self, model: nn.Module) -> None:
        """Take what the order follows from the weights as they are now."""

    def start(self, penalty: float) -> list[int]:
        """Return the bits of phase 1."""

    def order(self, bits: Sequence[int], *, up: bool) -> list[int]:
        """Return the items that can still move, the best to move first."""


class ByDivergence:
    """Clusters of sigma, then the KL divergence of weights and inputs. batches: where widths of inputs move."""

    name = "sigma"
    rounds = 1 << 30

    def __init__(self, layout: Layout, settings: SearchSettings, batches: Sequence[Any]) -> None:
        self.layout, self.settings, self.items = layout, settings, layout.items
        inputs = [item.layer for item in self.items if item.kind == "input"]
        model = layout.problem.model
        self.inputs: dict[str, Tensor] = sample_inputs(model, inputs, batches) if inputs else {}
        self.sigmas = item_sigmas(model, self.items, self.inputs)

    def look(self, model: nn.Module) -> None:
        """See ``Ranker``."""
        kl = self.settings.kl
        self.found = divergences(model, self.items, self.inputs, (kl,))[kl]

    def start(self, penalty: float) -> list[int]:
        """Return bits by clusters of sigma for weights, and 8 for inputs."""
        settings, menu = self.settings, self.layout.problem.menu
        index = [i for i, item in enumerate(self.items) if item.kind == "weight"]
        widths = cluster_bits(
            [self.sigmas[i] for i in index], menu, penalty, norm=settings.sigma_norm, clustering=settings.cluster
        )
        bits = self.layout.at(INT8)
        for i, width in zip(index, widths):
            bits[i] = self.items[i].at_least(width)
        return bits

    def order(self, bits: Sequence[int], *, up: bool) -> list[int]:
        """See ``Ranker``."""
        rank, alpha = self.settings.rank, self.settings.alpha
        return ranked(self.found, self.items, bits, up=up, rank=rank, alpha=alpha, sigmas=self.sigmas)


class ByFisher:
    """Ours, not the paper's: the expected rise of the loss (``sensitivity.fisher``) for what a move saves or costs.

    A cost counts as a share of its limit, all limits together; without limits, bytes count. The start meets all
    limits, and spends what is left of them. Only weights move.
    """

    name = "sigma_fisher"
    rounds = 1

    def __init__(self, layout: Layout, batches: Iterable[Any], loss: Loss) -> None:
        self.layout, self.items, self.batches, self.loss = layout, layout.items, list(batches), loss
        if any(item.kind == "input" for item in self.items):
            raise PlanError("Fisher information ranks weights: activations=True needs method 'sigma'")
        self.inputs: dict[str, Tensor] = {}
        self.sigmas = item_sigmas(layout.problem.model, self.items, self.inputs)
        self._shares: dict[tuple[int, int, int], float] = {}

    def look(self, model: nn.Module) -> None:
        """See ``Ranker``."""
        menu = {**self.layout.problem.choices(), **{item.layer: item.choices for item in self.items}}
        error = style_error(self.layout.problem.style)
        found = fisher(model, self.batches, self.loss, menu, quantize_error=error)
        self.rise = [dict(zip(item.choices, found[item.layer])) for item in self.items]

    def start(self, penalty: float) -> list[int]:
        """Return bits that meet every limit, from 8 bits everywhere; there are no clusters for a penalty to even."""
        return meet_limits(self.layout, self, self.layout.at(INT8))[0]

    def order(self, bits: Sequence[int], *, up: bool) -> list[int]:
        """See ``Ranker``."""
        rate = {}
        for i, item in enumerate(self.items):
            if (step := item.step(bits[i], up)) is not None:
                rate[i] = (self.rise[i][step] - self.rise[i][bits[i]]) / self._share(bits, i, step)
        return sorted(rate, key=lambda i: (rate[i], i))  # up: the most negative rise first

    def _share(self, bits: Sequence[int], index: int, step: int) -> float:
        """Return the cost between two widths of an item, which does not depend on the others."""
        key = (index, min(bits[index], step), max(bits[index], step))
        if key not in self._shares:
            before, after = (self.layout.costs([*bits[:index], b, *bits[index + 1 :]]) for b in key[1:])
            limits = self.layout.problem.budget.limits or {"size_bytes": before["size_bytes"]}
            self._shares[key] = max(sum((after[n] - before[n]) / limit for n, limit in limits.items()), 1e-12)
        return self._shares[key]


def meet_limits(layout: Layout, ranker: Ranker, bits: list[int]) -> tuple[list[int], int]:
    """Lower the first of the order until every limit holds, then raise the first ones that still fit.

    Returns the bits and the number of moves. The lowest widths must meet the limits (``Layout.require_possible``).
    """
    budget, moves = layout.problem.budget, 0
    while budget.exceeded(layout.costs(bits)):
        bits, moves = _moved(layout, bits, ranker.order(bits, up=False)[0], up=False), moves + 1
    full = set[int]()  # what does not fit now never will: raising only costs
    while left := [i for i in ranker.order(bits, up=True) if i not in full]:
        trial = _moved(layout, bits, left[0], up=True)
        if budget.exceeded(layout.costs(trial)):
            full.add(left[0])
        else:
            bits, moves = trial, moves + 1
    return bits, moves


def _moved(layout: Layout, bits: list[int], index: int, *, up: bool) -> list[int]:
    step = layout.items[index].step(bits[index], up)
    assert step is not None
    return [*bits[:index], step, *bits[index + 1 :]]
