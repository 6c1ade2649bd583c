"""Clusters of sigma: exact, contiguous, never empty."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fewbits.allocate.clusters import cluster_bits, cost_of, exact_clusters, lloyd_clusters, normalised
from fewbits.errors import PlanError

MENU = (2, 4, 6, 8)


@pytest.mark.parametrize("seed", range(6))
def test_no_partition_at_all_costs_less(seed: int) -> None:
    draw = np.random.default_rng(seed)
    values, count, penalty = draw.normal(size=4 + seed % 4), 3, (0.0, 0.1, 1.0)[seed % 3]
    found = cost_of(values, exact_clusters(values, count, penalty), count, penalty)
    every = itertools.product(range(count), repeat=len(values))
    best = min(cost_of(values, group, count, penalty) for group in every if len(set(group)) == count)
    assert found == pytest.approx(best)


@pytest.mark.parametrize("size", [8, 9, 10])
def test_no_runs_of_sorted_values_cost_less(size: int) -> None:
    values = np.random.default_rng(size).normal(size=size)
    order = np.argsort(values)
    for penalty in (0.0, 0.05, 0.3):
        costs = []
        for cuts in itertools.combinations(range(1, size), 3):
            group = np.empty(size, dtype=int)
            group[order] = np.searchsorted(cuts, np.arange(size), side="right")
            costs.append(cost_of(values, group.tolist(), 4, penalty))
        assert cost_of(values, exact_clusters(values, 4, penalty), 4, penalty) == pytest.approx(min(costs))


@pytest.mark.parametrize("penalty", [0.0, 0.1, 5.0, 1e9])
@pytest.mark.parametrize("count", [4, 7, 37])
def test_bits_follow_sigma_and_every_width_is_used(count: int, penalty: float) -> None:
    sigma = np.random.default_rng(count).gamma(1.0, size=count)
    bits = np.array(cluster_bits(sigma, MENU, penalty))
    assert (np.diff(bits[np.argsort(sigma)]) >= 0).all()
    assert set(bits) == set(MENU)
    if penalty > 1e6:
        sizes = np.bincount(bits)[list(MENU)]
        assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("norm", ["z", "minmax", "raw"])
def test_equal_sigma_and_layers_without_variance(norm: str) -> None:
    for sigma in ([0.1] * 9, [0.0] * 9, [0.0] * 8 + [1.0]):
        for clustering in ("dp", "lloyd"):
            bits = cluster_bits(sigma, MENU, 0.2, norm=norm, clustering=clustering)
            assert len(bits) == 9 and set(bits) <= set(MENU)
        assert set(cluster_bits(sigma, MENU, 0.2, norm=norm)) == set(MENU)
    assert not normalised([0.1, 0.1], "z").any()


def test_fewer_layers_than_widths_take_the_highest() -> None:
    assert cluster_bits([0.3, 0.1], MENU) == [8, 6]
    assert cluster_bits([0.3], MENU, clustering="lloyd") == [8]
    assert cluster_bits([], MENU) == []


def test_the_penalty_works_gradually_on_z_scores() -> None:
    sigma = np.random.default_rng(0).lognormal(sigma=1.5, size=40)

    def largest(penalty: float) -> int:
        return int(np.bincount(cluster_bits(sigma, MENU, penalty)).max())

    assert largest(0.0) > largest(0.1) > largest(1.0) >= 10


def test_the_literal_k_means_may_give_a_larger_sigma_fewer_bits() -> None:
    sigma = np.random.default_rng(3).lognormal(sigma=1.0, size=30)
    group = np.array(lloyd_clusters(normalised(sigma), 4, 2.0))
    assert (np.diff(group[np.argsort(sigma)]) < 0).any(), "with a strong penalty groups are not runs"
    plain = np.array(lloyd_clusters(normalised(sigma), 4, 0.0))
    assert (np.diff(plain[np.argsort(sigma)]) >= 0).all(), "without one it is k-means in one dimension"


def test_bad_input() -> None:
    with pytest.raises(PlanError, match="unknown sigma_norm 'zz'"):
        cluster_bits([1, 2], MENU, norm="zz")
    with pytest.raises(PlanError, match="unknown cluster 'lloyds'; did you mean 'lloyd'"):
        cluster_bits([1, 2], MENU, clustering="lloyds")
    for penalty in (-0.1, float("inf"), float("nan")):
        with pytest.raises(PlanError, match=f"must be finite and 0 or more, got {penalty}"):
            cluster_bits([1, 2], MENU, penalty)
    with pytest.raises(PlanError, match="must be finite"):
        cluster_bits([1, float("nan")], MENU)
