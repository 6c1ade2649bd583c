"""The order in which a search raises or lowers widths: by divergence, sigma, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.allocate.clusters import normalised
from fewbits.allocate.divergence import MODES, activation_divergence, scores, weight_divergence
from fewbits.allocate.layout import INT8, Item
from fewbits.errors import QuantizationError
from fewbits.layers import float_class, set_mode, twin_class
from fewbits.layers.swap import call, in_eval, layer_weight

SAMPLE = 1 << 16  # values of a tensor that are looked at

Table = dict[str, list[dict[int, float]]]  # by mode, by item: {bits: divergence}


def item_sigmas(model: nn.Module, items: Sequence[Item], inputs: Mapping[str, Tensor]) -> list[float]:
    """Return the standard deviation of the weight, or of the sampled input, of each item."""
    return [
        float((_weight(model, i.layer) if i.kind == "weight" else inputs[i.layer]).double().std(correction=0))
        for i in items
    ]


def divergences(
    model: nn.Module, items: Sequence[Item], inputs: Mapping[str, Tensor], modes: Sequence[str] = MODES
) -> Table:
    """Return the divergence of each item at each of its widths and at 8 bits, for the weights as they are now.

    inputs: samples of activations by layer, as of ``sample_inputs``; they have the ``spread`` divergence in both modes.
    """
    table: Table = {mode: [] for mode in modes}
    for item in items:
        widths = sorted({*item.choices, INT8})
        rows = _rows(model, item.layer) if item.kind == "weight" else inputs[item.layer]
        for mode in modes:
            if item.kind == "weight":
                table[mode].append({b: weight_divergence(rows, b, mode) for b in widths})
            else:
                table[mode].append({b: activation_divergence(rows, b) for b in widths})
    return table


def item_scores(found: Sequence[Mapping[int, float]], items: Sequence[Item], bits: Sequence[int]) -> list[float]:
    """Return S of each item at the given bits, for the divergences of one mode; weights and inputs apart."""
    score = [0.0] * len(items)
    for index in _kinds(items):
        now, base, worst = ([found[i][w] for i, w in zip(index, widths)] for widths in (
            [bits[i] for i in index], [INT8] * len(index), [items[i].choices[0] for i in index],
        ))  # fmt: skip
        for i, value in zip(index, scores(now, base, worst)):
            score[i] = value
    return score


def ranked(
    found: Sequence[Mapping[int, float]],
    items: Sequence[Item],
    bits: Sequence[int],
    *,
    up: bool,
    rank: str = "current",
    alpha: float = 0.0,
    sigmas: Sequence[float] = (),
) -> list[int]:
    """Return the items that can still move, by S: largest first to raise, smallest first to lower; ties by index.

    rank: lowering looks at S at the "current" bits, or at the "next" lower ones. alpha: share of the normalised sigma
    in S (S <- alpha sigma + (1 - alpha) S).
    """
    steps = [item.step(b, up) for item, b in zip(items, bits)]
    looked = [b if up or rank == "current" or step is None else step for b, step in zip(bits, steps)]
    score = item_scores(found, items, looked)
    if alpha:
        share = _by_kind(items, sigmas)
        score = [alpha * s + (1 - alpha) * d for s, d in zip(share, score)]
    free = [i for i, step in enumerate(steps) if step is not None]
    return sorted(free, key=lambda i: (-score[i] if up else score[i], i))


def sample_inputs(model: nn.Module, layers: Sequence[str], batches: Sequence[Any], sample: int = SAMPLE) -> Any:
    """Return {layer: values [n] of its input} over all batches, in float and in eval mode, about ``sample`` a layer."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    each = max(1, sample // max(len(batches), 1))

    def keep(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).detach().flatten()
        found[name].append(values[:: max(1, values.numel() // each)].float().cpu())

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: keep(name, args, kwargs), with_kwargs=True
        )
        for name in layers
    ]
    try:
        with in_eval(model), set_mode(model, "float"), torch.no_grad():
            for batch in batches:
                call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    unseen = [name for name, values in found.items() if not values]
    if unseen:
        raise QuantizationError(f"no calibration batch reached layers {unseen[:5]}: their inputs cannot be ranked")
    inputs = {name: torch.cat(values) for name, values in found.items()}
    for name, values in inputs.items():
        if not bool(torch.isfinite(values).all()):
            raise QuantizationError(f"input of layer {name!r} has NaN or Inf in the calibration batches: look for them")
    return inputs


def _kinds(items: Sequence[Item]) -> list[list[int]]:
    """Return the index of all weights and of all inputs: their divergences are of different histograms."""
    found = ([i for i, item in enumerate(items) if item.kind == kind] for kind in ("weight", "input"))
    return [index for index in found if index]


def _by_kind(items: Sequence[Item], sigmas: Sequence[float]) -> list[float]:
    """Return sigma in 0..1, weights and inputs apart."""
    found = [0.0] * len(items)
    for index in _kinds(items):
        for i, value in zip(index, normalised([sigmas[i] for i in index], "minmax")):
            found[i] = float(value)
    return found


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = layer_weight(model.get_submodule(name))
    assert weight is not None
    if not bool(torch.isfinite(weight).all()):
        raise QuantizationError(f"weight of layer {name!r} has NaN or Inf: look for where they first appear")
    return weight.detach()


def _rows(model: nn.Module, name: str) -> Tensor:
    """Return evenly spaced channels of a weight as rows, about SAMPLE elements."""
    weight, twin = _weight(model, name), twin_class(float_class(model.get_submodule(name)))
    assert twin is not None
    rows = weight.movedim(twin.channel_axis, 0)
    rows = rows.flatten(1) if rows.ndim > 1 else rows.reshape(-1, 1)
    kept = max(1, min(len(rows), SAMPLE * len(rows) // max(rows.numel(), 1)))
    index = torch.arange(kept, device=rows.device) * len(rows) // kept
    return rows.index_select(0, index)
