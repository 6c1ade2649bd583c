"""Divergence of weights from their quantized form: the expected values of the method, and its limits."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Laplace

from fewbits.allocate.divergence import (
    activation_divergence,
    plain_divergence,
    quantized,
    scores,
    spread_divergence,
)

WIDTHS = (2, 4, 6, 8)
EXPECTED = {plain_divergence: (14.2, 4.9, 0.67, 0.005), spread_divergence: (0.107, 0.018, 0.008, 0.003)}


@pytest.mark.parametrize("measure", EXPECTED, ids=["plain", "spread"])
def test_expected_values_for_gaussian_weights(measure: object) -> None:
    rows = [torch.randn(64, 576) for _ in range(4)]
    for bits, expected in zip(WIDTHS, EXPECTED[measure]):  # type: ignore[index]
        found = sum(measure(w, bits) for w in rows) / len(rows)  # type: ignore[operator]
        assert found == pytest.approx(expected, rel=0.2), bits


@pytest.mark.parametrize("measure", EXPECTED, ids=["plain", "spread"])
def test_fewer_bits_diverge_more(measure: object) -> None:
    for rows in (torch.randn(64, 576), Laplace(0.0, 1.0).sample((64, 576))):
        found = [measure(rows, bits) for bits in WIDTHS]  # type: ignore[operator]
        assert found == sorted(found, reverse=True) and len(set(found)) == 4 and found[-1] >= 0


def test_weights_on_the_grid_do_not_diverge() -> None:
    rows = torch.randint(-7, 8, (8, 400)).float()
    rows[:, 0] = 7
    assert torch.equal(quantized(rows, 4), rows)
    assert plain_divergence(rows, 4) == 0
    assert spread_divergence(rows, 4) == pytest.approx(0, abs=1e-12)
    assert plain_divergence(rows, 2) > 0


@pytest.mark.parametrize("rows", [torch.zeros(3, 9), torch.full((3, 9), 0.25), torch.zeros(0, 9), torch.ones(1, 1)])
def test_weights_without_variance(rows: torch.Tensor) -> None:
    for measure in EXPECTED:
        assert [measure(rows, bits) for bits in (1, *WIDTHS)] == [0] * 5
    assert activation_divergence(rows, 4) == 0


def test_plain_is_ruled_by_empty_bins_and_spread_is_not() -> None:
    flat, bell = torch.rand(64, 576) * 2 - 1, torch.randn(64, 576)
    assert plain_divergence(flat, 4) > plain_divergence(bell, 4)
    assert spread_divergence(flat, 4) < spread_divergence(bell, 4)


def test_two_bits_are_ternary() -> None:
    rows = torch.randn(4, 50)
    assert all(len(row.unique()) <= 3 for row in quantized(rows, 2))
    assert torch.equal(quantized(rows, 2).abs().amax(1), rows.abs().amax(1))


def test_one_bit_has_two_levels() -> None:
    rows = torch.cat([torch.linspace(-1, -0.01, 100), torch.linspace(0.01, 1, 10000)]).reshape(1, -1)
    flat = spread_divergence(torch.linspace(-1, 1, 10000).reshape(1, -1), 1)
    assert spread_divergence(rows, 1) == pytest.approx(flat, abs=0.01), "each half is even, so a level stands for it"


def test_activations() -> None:
    values = torch.randn(20_000).relu()
    found = [activation_divergence(values, bits) for bits in WIDTHS]
    assert found == sorted(found, reverse=True) and found[0] > 10 * found[-1]
    assert activation_divergence(torch.randint(0, 4, (5000,)).float(), 2) == pytest.approx(0, abs=1e-12)


def test_scores_count_from_8_bits_to_the_worst() -> None:
    assert scores([3.0, 1.0, 9.0], [1.0, 1.0, 1.0], [5.0, 2.0, 5.0]) == pytest.approx([0.5, 0.0, 1.0])
    assert scores([0.0], [0.0], [0.0]) == [0.0]
