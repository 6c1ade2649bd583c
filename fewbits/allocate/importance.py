"""How much each weight matters to each group, merged over the groups: what FairQuant (arXiv 2602.23192) allocates by.

Every group has batches of its own, so each example is run once, forward and backward. Maps are folded group by group
and layer by layer: beside the weights and one layer's gradient, two maps of the weights' size are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.allocate.sensitivity import checked_loss, own_layers, own_weights, probing
from fewbits.errors import DataError, PlanError, QuantizationError
from fewbits.layers import float_class, twin_class

METRICS = ("grape", "gradient", "fisher")
REDUCERS = ("balanced", "max", "mean", "cvar")
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Importance:
    """merged: of each weight over all groups, by layer, of the weight's shape. groups: {group: {layer: sums over each
    output channel, [channels]}}. metric, reducer: how it was measured and merged.
    """

    merged: dict[str, Tensor]
    groups: dict[str, dict[str, Tensor]]
    metric: str
    reducer: str

    def units(self, model: nn.Module, unit: str = "channel", how: str = "sum") -> dict[str, Tensor]:
        """Return the pooled importance by layer: of each output channel, [channels], or of the whole layer, [1]."""
        if unit not in ("channel", "layer") or how not in ("sum", "mean"):
            raise PlanError(f"unit must be 'channel' or 'layer', how 'sum' or 'mean', got {unit!r} and {how!r}")
        found = {}
        for name, layer in own_layers(model).items():
            rows = channel_rows(layer, self.merged[name]) if unit == "channel" else self.merged[name].reshape(1, -1)
            found[name] = rows.double().sum(1) if how == "sum" else rows.double().mean(1)
        return found


def group_importance(
    model: nn.Module,
    groups: Mapping[str, Iterable[Any]],
    loss: Loss,
    *,
    metric: str = "grape",
    reducer: str = "balanced",
    alpha: float = 0.1,
) -> Importance:
    """Measure the importance of every weight of a float model for each group, and merge it over the groups.

    groups: {name: batches that hold examples of this group alone}. loss: (model, batch) -> scalar, the mean over the
    batch. metric, the mean over a group's batches of, with g the gradient of its loss: "gradient" |g|; "grape" (g w)^2,
    first-order Taylor squared; "fisher" the mean over examples of g_i^2 w^2, batches of one each, or as small as given.
    reducer, element by element: "max"; "mean"; "cvar", the mean of the ceil((1 - alpha) groups) largest, which keeps so
    many maps; "balanced", the max of maps scaled to one total each, then to the sum of totals. The model runs in float
    and in eval mode, its parameters and buffers stay bit-identical.
    Raises PlanError for an unknown name, DataError for a group without batches and for a loss that is not finite, and
    QuantizationError, naming group and layer, for importance that is not finite.
    """
    for what, value, known in (("metric", metric, METRICS), ("reducer", reducer, REDUCERS)):
        if value not in known:
            raise PlanError(f"{what} must be one of {known}, got {value!r}")
    if not groups:
        raise DataError("importance needs groups, got none: give {name: batches}")
    merge, totals, sums = Merge(reducer, len(groups), alpha), dict[str, float](), dict[str, dict[str, Tensor]]()
    layers = own_layers(model)
    for group, batches in groups.items():
        maps = _group_map(model, group, batches, loss, metric)
        for name, found in maps.items():
            if not bool(torch.isfinite(found).all()):
                raise QuantizationError(
                    f"the importance of layer {name!r} for group {group!r} is not finite: look for huge weights or "
                    "gradients in the model, or lower the scale of the loss"
                )
        sums[group] = {name: channel_rows(layers[name], found).double().sum(1) for name, found in maps.items()}
        totals[group] = sum(float(pooled.sum()) for pooled in sums[group].values())
        merge.add(maps, totals[group])
    return Importance(merge.result(totals), sums, metric, reducer)


class Merge:
    """Folds the map of one group after the other into that of all."""

    def __init__(self, reducer: str, count: int, alpha: float) -> None:
        if not 0 <= alpha < 1:
            raise PlanError(f"alpha is the share of groups that cvar leaves out, 0 <= alpha < 1, got {alpha}")
        self.reducer, self.count = reducer, count
        self.kept = max(1, -(-round((1 - alpha) * count * 1e9) // 10**9)) if reducer == "cvar" else 1
        self.maps: list[dict[str, Tensor]] = []  # of cvar the largest values so far, descending; else one map

    def add(self, maps: dict[str, Tensor], total: float) -> None:
        """Take the map of one more group; total: the sum of its elements. The maps may be changed."""
        if self.reducer == "balanced" and total > 0:
            for found in maps.values():
                found /= total
        if not self.maps:
            self.maps.append(maps)
            return
        if self.reducer == "mean" or (self.reducer == "cvar" and self.kept == self.count):
            for name, found in maps.items():
                self.maps[0][name] += found
            return
        for held in self.maps:
            for name, found in maps.items():
                smaller = torch.minimum(held[name], found) if self.reducer == "cvar" else None
                torch.maximum(held[name], found, out=held[name])
                if smaller is not None:
                    maps[name] = smaller
        if len(self.maps) < self.kept:
            self.maps.append(maps)

    def result(self, totals: Mapping[str, float]) -> dict[str, Tensor]:
        """Return the merged map."""
        merged = self.maps[0]
        if self.reducer == "mean" or (self.reducer == "cvar" and self.kept == self.count):
            return {name: found / self.count for name, found in merged.items()}
        if self.reducer == "cvar":
            return {name: sum(held[name] for held in self.maps) / len(self.maps) for name in merged}  # type: ignore[misc]
        factor = sum(totals.values()) if self.reducer == "balanced" else 1.0
        return {name: found * factor for name, found in merged.items()}


def channel_rows(layer: nn.Module, values: Tensor) -> Tensor:
    """Return values of the shape of a layer's weight as rows, one an output channel."""
    twin = twin_class(float_class(layer))
    assert twin is not None
    moved = values.movedim(twin.channel_axis, 0)
    return moved.reshape(len(moved), -1)


def _group_map(model: nn.Module, group: str, batches: Iterable[Any], loss: Loss, metric: str) -> dict[str, Tensor]:
    """Return the mean importance of every weight over the batches of one group."""
    weights = own_weights(model)
    maps = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}

    def note(name: str) -> Callable[[Tensor], None]:
        def fold(weight: Tensor) -> None:
            gradient = weight.grad
            assert gradient is not None
            if metric == "gradient":
                maps[name] += gradient.abs()
            else:
                maps[name] += (gradient * weight.detach()).square()
            weight.grad = None  # its memory is free before the next layer's gradient is there

        return fold

    held, count = {name: weight.grad for name, weight in weights.items()}, 0
    with probing(model, weights.values()):
        handles = [w.register_post_accumulate_grad_hook(note(n)) for n, w in weights.items()]  # type: ignore[no-untyped-call]
        others = [p for p in model.parameters() if p.requires_grad and not any(p is w for w in weights.values())]
        try:
            for weight in weights.values():
                weight.grad = None
            _set_grad(others, False)
            for batch in batches:
                for part in _singles(batch) if metric == "fisher" else (batch,):
                    count += 1
                    checked_loss(loss, model, part, count, f"of group {group!r}").backward()  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()
            _set_grad(others, True)
            for name, weight in weights.items():
                weight.grad = held[name]
    if not count:
        raise DataError(f"group {group!r} has no batch: take it out, or give examples of it")
    return {name: found / count for name, found in maps.items()}


def _set_grad(parameters: Iterable[Tensor], needed: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(needed)


def _singles(batch: Any) -> Iterable[Any]:
    """Return the examples of a batch (a tuple of tensors with the batch first), each as a batch of one."""
    if not isinstance(batch, Sequence) or not all(isinstance(part, Tensor) for part in batch):
        raise DataError("metric 'fisher' cuts batches into examples: they must be tuples of tensors, the batch first")
    return (tuple(part[i : i + 1] for part in batch) for i in range(len(batch[0])))
