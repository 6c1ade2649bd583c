"""Phase 2 of SigmaQuant (arXiv 2602.22136): Kullback-Leibler divergence between a tensor and its quantized form.

Weights are read as rows of channels, quantized per channel by their largest magnitude: L = 2^(b-1) - 1,
s = max|w| / L, q = clip(round(w / s), -L, L). Two readings of "the histograms' divergence": ``plain`` is the literal
one, ruled by its empty bins; ``spread`` gives each level the probability of its cell, and needs no epsilon.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MODES = ("plain", "spread")
PLAIN_BINS, SPREAD_BINS = 256, 512
EPSILON = 1e-6
FLOOR = 1e-12


def plain_divergence(rows: Tensor, bits: int) -> float:
    """Return sum P ln(P / Q) in nats over 256 bins on [-a, a], a = max|w|, of weights [C, m] and quantized ones.

    Each bin gets EPSILON * n / 256 counts more, so that none is empty. A tensor of zeros has 0.
    """
    rows = rows.detach().float().cpu()
    reach = float(rows.abs().max()) if rows.numel() else 0.0
    if reach == 0.0:
        return 0.0
    p, q = (_counts(x, -reach, reach, PLAIN_BINS) for x in (rows, quantized(rows, bits)))
    smooth = EPSILON * rows.numel() / PLAIN_BINS
    return _divergence(p + smooth, q + smooth)


def spread_divergence(rows: Tensor, bits: int) -> float:
    """Return sum P ln(P / Q) in nats over 512 bins on [-1, 1] of weights [C, m], each channel by its largest one.

    Q: each level's cell has the probability that P has there, evenly over those of its bins that P fills.
    """
    rows = rows.detach().float().cpu()
    if not rows.numel():
        return 0.0
    top = 2 ** (bits - 1) - 1
    p = _counts(rows / rows.abs().amax(1, keepdim=True).clamp(min=FLOOR), -1.0, 1.0, SPREAD_BINS)
    centers = (torch.arange(SPREAD_BINS, dtype=torch.float64) + 0.5) * 2 / SPREAD_BINS - 1
    cell = (centers >= 0).long() if bits == 1 else (centers * top).round().long() + top  # two levels: the sign
    return _spread(p, cell)


def activation_divergence(values: Tensor, bits: int) -> float:
    """Return the spread divergence of activations [n] on the affine grid between their 0.1th and 99.9th percentile."""
    values = values.detach().float().cpu().flatten()
    if not values.numel():
        return 0.0
    low, high = (float(torch.quantile(values, share)) for share in (0.001, 0.999))
    if high <= low:
        return 0.0
    p = _counts(values.clamp(low, high), low, high, SPREAD_BINS)
    centers = (torch.arange(SPREAD_BINS, dtype=torch.float64) + 0.5) / SPREAD_BINS
    return _spread(p, (centers * (2**bits - 1)).round().long())


def weight_divergence(rows: Tensor, bits: int, mode: str) -> float:
    """Return the divergence of weights [C, m] by the name of its mode."""
    return (plain_divergence if mode == "plain" else spread_divergence)(rows, bits)


def quantized(rows: Tensor, bits: int) -> Tensor:
    """Return weights [C, m] fake-quantized, per row, symmetric and narrow, by the largest magnitude."""
    top = 2 ** (bits - 1) - 1
    step = (rows.abs().amax(1, keepdim=True) / max(top, 1)).clamp(min=FLOOR)
    if bits == 1:  # two levels: the sign
        return torch.where(rows < 0, -step, step)
    values: Tensor = (rows / step).round().clamp(-top, top) * step
    return values


def scores(now: Sequence[float], base: Sequence[float], worst: Sequence[float]) -> list[float]:
    """Return S_i = clip((D_i(b_i) - D_i(8)) / max_j(D_j(lowest) - D_j(8)), 0, 1) for divergences by item.

    now, base, worst: at the present bits, at 8 bits, and at the lowest.
    """
    unit = max((w - b for w, b in zip(worst, base)), default=0.0) + 1e-12
    return [min(max((n - b) / unit, 0.0), 1.0) for n, b in zip(now, base)]


def _counts(x: Tensor, low: float, high: float, bins: int) -> Tensor:
    """Return float64 counts [bins]; values that rounding put outside count at the ends."""
    return torch.histc(x.clamp(low, high), bins, low, high).double()


def _spread(p: Tensor, cell: Tensor) -> float:
    """Return the divergence of counts [bins] from what is left when each cell of bins is evened out."""
    filled = (p > 0).double()
    mass, room = (torch.zeros(int(cell.max()) + 1, dtype=torch.float64).index_add_(0, cell, x) for x in (p, filled))
    return _divergence(p, (mass / room.clamp(min=1))[cell])


def _divergence(p: Tensor, q: Tensor) -> float:
    there = p > 0
    p, q = p[there] / p.sum(), q[there] / q[there].sum()
    return max(float((p * (p / q).log()).sum()), 0.0)
