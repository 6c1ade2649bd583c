"""Ranges: every search gives a usable scale, keeps zero exact, and MSE is never worse than min-max."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.plan import RANGES
from fewbits.quantizers.codes import Grid, make_grid
from fewbits.quantizers.ranges import SAMPLE, find_range, from_bounds, largest_scale, quantize_rows, thin


def error(x: Tensor, grid: Grid, symmetric: bool, method: str) -> Tensor:
    """Return the squared error of each row."""
    scale, zero = find_range(x, grid, symmetric=symmetric, method=method)
    return (quantize_rows(x, scale[:, None], zero[:, None], grid) * scale[:, None] - x).square().sum(1)


@settings(max_examples=50)
@given(
    bits=st.integers(1, 8),
    symmetric=st.booleans(),
    odd=st.booleans(),
    rows=st.integers(1, 4),
    columns=st.integers(1, 40),
    tail=st.floats(0, 6),
    shift=st.floats(-2, 2),
    seed=st.integers(0, 1000),
)
def test_mse_is_never_worse_than_minmax(
    bits: int, symmetric: bool, odd: bool, rows: int, columns: int, tail: float, shift: float, seed: int
) -> None:
    grid = make_grid(bits, symmetric=symmetric, odd=odd and symmetric)
    normal = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x = normal * normal.abs() ** tail + shift
    searched, full = (error(x, grid, symmetric, method) for method in ("mse", "minmax"))
    assert bool((searched <= full * (1 + 1e-5)).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_clips_an_outlier_and_percentile_drops_it(symmetric: bool) -> None:
    x = torch.randn(1, 4001)
    x[0, 0] = 60.0
    grid = make_grid(4, symmetric=symmetric)
    assert float(error(x, grid, symmetric, "mse")) < 0.8 * float(error(x, grid, symmetric, "minmax"))
    scales = {m: float(find_range(x, grid, symmetric=symmetric, method=m)[0]) for m in RANGES}
    assert scales["percentile"] * grid.highest < 10 < scales["minmax"] * grid.highest
    bulk = x[:, 1:]
    scale, zero = find_range(x, grid, symmetric=symmetric, method="percentile")
    clipped = quantize_rows(bulk, scale[:, None], zero[:, None], grid) * scale - bulk
    assert float((clipped.abs() > scale).float().mean()) < 0.004


def test_percentile_is_the_quantile() -> None:
    x = torch.linspace(-1, 3, 1001)[None]
    grid = make_grid(8, symmetric=False)
    scale, zero = find_range(x, grid, symmetric=False, method="percentile", percentile=90.0)
    low, high = -float(zero) * float(scale), (255 - float(zero)) * float(scale)
    assert low == pytest.approx(-0.6, abs=0.02) and high == pytest.approx(2.6, abs=0.02)
    assert torch.equal(
        find_range(x, grid, symmetric=False, method="percentile", percentile=100.0)[0],
        find_range(x, grid, symmetric=False, method="minmax")[0],
    )


@given(
    bits=st.sampled_from((1, 2, 3, 4, 8, 16)),
    method=st.sampled_from(RANGES),
    low=st.floats(-(2.0**120), 2.0**120, width=32),
    span=st.floats(0, 2.0**120, width=32),
)
def test_zero_has_a_code_of_its_own_on_affine_grids(bits: int, method: str, low: float, span: float) -> None:
    grid = make_grid(bits, symmetric=False)
    x = torch.tensor([[low, low + span]])
    scale, zero = find_range(x, grid, symmetric=False, method=method)
    assert float(zero) == int(zero) and grid.lowest <= int(zero) <= grid.highest
    q = quantize_rows(torch.zeros(1, 1), scale[:, None], zero[:, None], grid)
    assert float(q) == 0.0 and float(scale) > 0


@pytest.mark.parametrize("method", RANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("odd", [True, False])
def test_scales_are_positive_finite_and_decode_finite(method: str, dtype: torch.dtype, odd: bool) -> None:
    info = torch.finfo(dtype)
    rows = [0.0, info.max, info.min, info.tiny, info.smallest_normal / 8, 1.0]
    x = torch.tensor([[r, r / 2, -r] for r in rows], dtype=torch.float64).to(dtype)
    for symmetric in (True, False):
        grid = make_grid(3, symmetric=symmetric, odd=odd and symmetric)
        scale, zero = find_range(x, grid, symmetric=symmetric, method=method)
        assert bool((scale > 0).all()) and bool((scale <= largest_scale(grid)).all())
        assert bool(torch.isfinite(zero).all())


@pytest.mark.parametrize("method", RANGES)
def test_a_row_of_zeros_stays_zero_also_on_a_grid_without_zero(method: str) -> None:
    """A pruned channel or the padding row of an embedding must not come back as plus or minus one."""
    x = torch.zeros(2, 5)
    for grid in (make_grid(1, symmetric=True), make_grid(3, symmetric=True, odd=True), make_grid(4, symmetric=True)):
        scale, _ = find_range(x, grid, symmetric=True, method=method)
        y = quantize_rows(x, scale[:, None], None, grid) * scale[:, None]
        assert float(y.abs().max()) < 1e-30


def test_one_bit_takes_the_mean_of_the_magnitudes() -> None:
    """The least-squares scale of sign(x) is mean |x| (Rastegari et al. 2016, XNOR-Net, eq. 6)."""
    x = torch.randn(3, 500)
    scale, _ = find_range(x, make_grid(1, symmetric=True), symmetric=True, method="mse")
    torch.testing.assert_close(scale, x.abs().mean(1))


def test_constant_rows_come_back_exactly_at_the_end_of_the_grid() -> None:
    x = torch.tensor([[2.5] * 4, [-2.5] * 4])
    for method in RANGES:
        grid = make_grid(4, symmetric=False)
        scale, zero = find_range(x, grid, symmetric=False, method=method)
        torch.testing.assert_close(quantize_rows(x, scale[:, None], zero[:, None], grid) * scale[:, None], x)


def test_from_bounds_spans_the_bounds() -> None:
    low, high = torch.tensor([-1.0, 0.0, -3.0]), torch.tensor([2.0, 5.0, 0.0])
    for bits in (2, 4, 8):
        grid = make_grid(bits, symmetric=False)
        scale, zero = from_bounds(low, high, grid, False)
        torch.testing.assert_close((grid.highest - grid.lowest) * scale, high - low)
        assert bool(((grid.lowest - zero) * scale - low).abs().le(scale / 2 + 1e-6).all())
        grid = make_grid(bits, symmetric=True)
        scale, zero = from_bounds(low, high, grid, True)
        assert bool((grid.highest * scale >= high - 1e-6).all()) and bool((grid.lowest * scale <= low + 1e-6).all())
        assert not zero.any()


def test_long_rows_are_thinned_evenly_and_always_alike() -> None:
    x = torch.arange(3 * SAMPLE + 5, dtype=torch.float32)[None]
    thinned = thin(x)
    assert thinned.shape[1] <= SAMPLE and torch.equal(thinned, thin(x))
    assert len(set(thinned.diff().flatten().tolist())) == 1
    short = torch.randn(2, 7)
    assert thin(short) is short
