"""Phase 1 of SigmaQuant (arXiv 2602.22136, Alg. 1 and eq. 2): layers into clusters by sigma, one width a cluster.

sigma is the standard deviation of a layer's weights. A wide layer gets many bits, a narrow one few. Cost of clusters
C_1..C_K of N layers: J = sum_j sum_{i in C_j} (sigma_i - mu_j)^2 + lambda sum_j (|C_j| - N/K)^2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fewbits.errors import PlanError, nearest

Array = NDArray[np.float64]
NORMS = ("z", "minmax", "raw")
CLUSTERINGS = ("dp", "lloyd")
LLOYD_ROUNDS = 100


def normalised(sigma: Sequence[float], norm: str = "z") -> Array:
    """Return sigma [N] as z-scores ("z"), in 0..1 ("minmax"), or as it is ("raw").

    Layers that are all alike have z-scores and min-max values of 0. Raises PlanError for another name, and for values
    that are not finite.
    """
    values = np.asarray(sigma, dtype=np.float64)
    if not np.isfinite(values).all():
        raise PlanError(f"sigma of layers must be finite, got {values.tolist()}: look for NaN or Inf among the weights")
    if norm == "raw":
        return values
    if norm not in NORMS:
        raise PlanError(f"unknown sigma_norm {norm!r}{nearest(norm, NORMS)}; known: {NORMS}")
    low, unit = (values.mean(), values.std()) if norm == "z" else (values.min(), np.ptp(values))
    if unit <= 1e-12 * np.abs(values).max():  # equal up to rounding
        return np.zeros_like(values)
    scaled: Array = (values - low) / unit
    return scaled


def cluster_bits(
    sigma: Sequence[float], menu: Sequence[int], penalty: float = 0.0, *, norm: str = "z", clustering: str = "dp"
) -> list[int]:
    """Return the bits of each layer: one cluster a width of the ascending ``menu``, wider clusters more bits.

    Fewer layers than widths get the highest widths of the menu, one each. Raises PlanError for an unknown ``norm`` or
    ``clustering``, or a negative ``penalty`` (lambda).
    """
    if not 0 <= penalty < np.inf:
        raise PlanError(f"the penalty lambda of unequal clusters must be finite and 0 or more, got {penalty!r}")
    if clustering not in CLUSTERINGS:
        raise PlanError(f"unknown cluster {clustering!r}{nearest(clustering, CLUSTERINGS)}; known: {CLUSTERINGS}")
    count = min(len(menu), len(sigma))
    if not count:
        return []
    values = normalised(sigma, norm)
    widths = sorted(menu)[-count:]
    group = (exact_clusters if clustering == "dp" else lloyd_clusters)(values, count, penalty)
    return [widths[g] for g in group]


def exact_clusters(values: Array, count: int, penalty: float) -> list[int]:
    """Return the cluster 0..count-1 of each value [N], ascending, none empty, of least J; N >= count.

    The best clusters under J are runs of the sorted values, so dynamic programming over them is exact: O(K N^2).
    Equal values keep their order.
    """
    order = np.argsort(values, kind="stable")
    total, ordered = len(values), values[order]
    cost = _run_costs(ordered) + penalty * (_run_lengths(total) - total / count) ** 2
    best = np.full((count + 1, total + 1), np.inf)
    best[0, 0] = 0.0
    cut = np.zeros((count + 1, total + 1), dtype=np.intp)
    for k in range(1, count + 1):
        for j in range(k, total + 1):
            options = best[k - 1, :j] + cost[:j, j]
            cut[k, j] = int(options.argmin())
            best[k, j] = options[cut[k, j]]
    group, end = np.zeros(total, dtype=np.intp), total
    for k in range(count, 0, -1):
        start = cut[k, end]
        group[order[start:end]] = k - 1
        end = start
    return [int(g) for g in group]


def cost_of(values: Array, group: Sequence[int], count: int, penalty: float) -> float:
    """Return J of a clustering."""
    members = [values[np.asarray(group) == g] for g in range(count)]
    spread = sum(float(((m - m.mean()) ** 2).sum()) for m in members if len(m))
    return spread + penalty * sum((len(m) - len(values) / count) ** 2 for m in members)


def lloyd_clusters(values: Array, count: int, penalty: float) -> list[int]:
    """Return clusters by k-means as the paper writes it: the penalty weighs on the assignment of each layer in turn.

    Means start evenly between the extremes, each layer at the nearest. A layer goes where (sigma - mu)^2 plus the rise
    of the penalty is least. Clusters need not be runs of the sorted values, and may be empty; they are numbered by
    their means.
    """
    means = np.linspace(values.min(), values.max(), count)
    group = np.abs(values[:, None] - means).argmin(1)
    for _ in range(LLOYD_ROUNDS):
        before, sizes = group.copy(), np.bincount(group, minlength=count)
        for i, value in enumerate(values):
            sizes[group[i]] -= 1
            rise = (sizes + 1 - len(values) / count) ** 2 - (sizes - len(values) / count) ** 2
            group[i] = int(((value - means) ** 2 + penalty * rise).argmin())
            sizes[group[i]] += 1
        means = np.array([values[group == g].mean() if sizes[g] else means[g] for g in range(count)])
        if np.array_equal(before, group):
            break
    rank = np.empty(count, dtype=np.intp)
    rank[np.argsort(means, kind="stable")] = np.arange(count)
    return [int(g) for g in rank[group]]


def _run_costs(ordered: Array) -> Array:
    """Return [N+1, N+1]: entry (i, j) is the squared deviation of ordered[i:j] from its mean."""
    ordered = ordered - ordered.mean()  # so that differences of the squared sums stay exact enough
    sums, squares = np.zeros(len(ordered) + 1), np.zeros(len(ordered) + 1)
    sums[1:], squares[1:] = np.cumsum(ordered), np.cumsum(ordered**2)
    lengths = np.maximum(_run_lengths(len(ordered)), 1)
    runs: Array = (squares[None, :] - squares[:, None]) - (sums[None, :] - sums[:, None]) ** 2 / lengths
    return np.maximum(runs, 0.0)


def _run_lengths(total: int) -> Array:
    index = np.arange(total + 1, dtype=np.float64)
    lengths: Array = index[None, :] - index[:, None]
    return lengths
