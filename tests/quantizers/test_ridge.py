"""Ridge dequantization: its closed form, its gradient, and what both must keep (float64)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits.plan import Sparsity
from fewbits.quantizers.codes import Grid, make_grid
from fewbits.quantizers.ridge import Ridge, denoise
from fewbits.quantizers.sparsity import find_pruned

N = 32
MODES: dict[str, dict[str, Any]] = {
    "affine": {"symmetric": False},
    "linear": {"symmetric": True, "narrow": True},
    "odd": {"symmetric": True, "odd": True},
    "sparse": {"symmetric": True, "narrow": True, "sparse": True},
}


def rows(count: int = 12) -> Tensor:
    """Return rows of several distributions and sizes, no two values equal."""
    x = torch.randn(count, N, dtype=torch.float64)
    return torch.cat([x, x.exp(), x * 1e-12 + 3e-12, 1e12 * x.pow(3), 5 + 1e-3 * x])


def made(mode: str, bits: int, **fields: Any) -> tuple[Ridge, Callable[[Tensor], Tensor | None]]:
    """Return the rule of a mode, and what tells where rows are pruned."""
    kind = dict(MODES[mode])
    sparse = kind.pop("sparse", False)
    rule = Ridge(make_grid(bits, **kind), **{"lam": 0.01, **fields})
    return rule, lambda x: find_pruned(x.detach(), Sparsity(2, 4), 1) if sparse else None


def forward(rule: Ridge, x: Tensor, pruned: Tensor | None = None) -> Tensor:
    fit = rule.fit(x, pruned)
    product = fit.values * fit.scale
    return product if fit.offset is None else product + fit.offset


def both(test: Any) -> Any:
    return pytest.mark.parametrize("mode", MODES)(pytest.mark.parametrize("bits", [1, 2, 4, 8])(test))


@both
def test_the_closed_form_solves_the_normal_equations(mode: str, bits: int) -> None:
    rule, where = made(mode, bits)
    x = torch.randn(20, N, dtype=torch.float64)
    pruned = where(x)
    fit, step = rule.fit(x, pruned), rule.moments(x, pruned).step
    for i in range(len(x)):
        q = fit.values[i]
        if fit.offset is None:
            a = torch.linalg.solve((q @ q / N + 0.01).reshape(1, 1), (q @ x[i] / N).reshape(1))
        else:
            ones = torch.ones_like(q)
            gram = torch.stack([torch.stack([q @ q / N + 0.01, q.mean()]), torch.stack([q.mean(), ones.mean()])])
            a = torch.linalg.solve(gram, torch.stack([q @ x[i], x[i].sum()]) / N)
            torch.testing.assert_close(fit.offset[i, 0], a[1], rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(fit.scale[i, 0], a[0], rtol=1e-13, atol=1e-14)
    assert bool((fit.scale > 0).all()) and bool((step > 0).all())


@pytest.mark.parametrize("gradient", ["denoise", "gain"])
@pytest.mark.parametrize("detach_range", [False, True])
@both
def test_value_and_gradient_are_those_of_plain_autograd(
    mode: str, bits: int, detach_range: bool, gradient: str
) -> None:
    widest = {"affine": 4, "linear": 2, "sparse": 2}.get(mode, 0)  # that the mean magnitude is for
    for absmean, mask in ((False, False), (True, False), (True, True))[: 3 if bits <= widest else 1]:
        options = {"detach_range": detach_range, "gradient": gradient, "absmean": absmean, "mask_clipped": mask}
        rule, where = made(mode, bits, **options)
        x = rows().requires_grad_()
        pruned = where(x)
        y = denoise(
            x,
            rule.grid,
            0.01,
            pruned=pruned,
            absmean=absmean,
            detach_range=detach_range,
            detach_slope=gradient == "gain",
            mask_clipped=mask,
        )
        with torch.no_grad():
            scale = x.abs().amax(1, keepdim=True)
            assert ((forward(rule, x, pruned) - y) / scale).abs().max() < 1e-13
        u = torch.randn_like(x)
        (wanted,) = torch.autograd.grad(y, x, u)
        torch.testing.assert_close(rule.vjp(u, x.detach(), pruned), wanted, rtol=1e-9, atol=1e-9)


def with_noise(x: Tensor, grid: Grid, base: Tensor, pruned: Tensor | None, detached: bool) -> Tensor:
    """The quantizer with the rounding error d and the pruning error of ``base`` as constants, in plain algebra."""

    def steps(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low = x.amin(1, keepdim=True) if grid.lowest == 0 else torch.zeros(len(x), 1, dtype=x.dtype)
        size = x.amax(1, keepdim=True) - low if grid.lowest == 0 else x.abs().amax(1, keepdim=True)
        return (x - low) / (size / grid.highest), low, size / grid.highest

    kept = base if pruned is None else base.masked_fill(pruned, 0.0)
    at_base, low, step = steps(kept)
    d = Ridge(grid).fit(base, pruned).values - at_base
    xs = x + (kept - base)
    f = (xs - low) / step if detached else steps(xs)[0]
    q = f + d
    if grid.lowest == 0:
        a = ((q - q.mean(1, keepdim=True)) * x).mean(1, keepdim=True) / (q.var(1, correction=0, keepdim=True) + 0.01)
        return a * (q - q.mean(1, keepdim=True)) + x.mean(1, keepdim=True)
    return (q * x).mean(1, keepdim=True) / (q.square().mean(1, keepdim=True) + 0.01) * q


@pytest.mark.parametrize("detach_range", [False, True])
@both
def test_gradient_against_finite_differences(mode: str, bits: int, detach_range: bool) -> None:
    rule, where = made(mode, bits, detach_range=detach_range)
    x, u = torch.randn(4, N, dtype=torch.float64), torch.randn(4, N, dtype=torch.float64)
    pruned = where(x)
    got = rule.vjp(u, x, pruned)
    for i in range(N):
        e = torch.zeros_like(x)
        e[:, i] = 1e-6
        plus, minus = (with_noise(x + sign * e, rule.grid, x, pruned, detach_range) for sign in (1, -1))
        slope = (u * (plus - minus)).sum(1) / 2e-6
        torch.testing.assert_close(got[:, i], slope, rtol=1e-6, atol=3e-8)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_jacobian_of_full_autograd(bits: int) -> None:
    """y is homogeneous and moves with x, and the mean of the gradient passes: J x = y, J 1 = 1, 1^T J = 1^T."""
    rule, _ = made("affine", bits)
    x = torch.randn(1, N, dtype=torch.float64)
    jacobian = torch.cat([rule.vjp(u[None], x, None) for u in torch.eye(N, dtype=torch.float64)])
    ones = torch.ones(N, dtype=torch.float64)
    torch.testing.assert_close(jacobian @ x[0], forward(rule, x)[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(jacobian @ ones, ones, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ones @ jacobian, ones, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["linear", "odd"])
def test_linear_full_autograd_is_homogeneous(mode: str) -> None:
    rule, where = made(mode, 4)
    x = torch.randn(1, N, dtype=torch.float64)
    pruned = where(x)
    jacobian = torch.cat([rule.vjp(u[None], x, pruned) for u in torch.eye(N, dtype=torch.float64)])
    torch.testing.assert_close(jacobian @ x[0], forward(rule, x, pruned)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_error_has_a_floor(bits: int) -> None:
    """mean((y - x)^2) = Var x - Cov^2 (Var q + 2 lam) / (Var q + lam)^2, hence never above Var x."""
    rule, _ = made("affine", bits)
    x = torch.cat([torch.randn(50, N, dtype=torch.float64), torch.randn(50, N, dtype=torch.float64).pow(5)])
    q, y = rule.fit(x, None).values, forward(rule, x)
    var_x, var_q = x.var(1, correction=0), q.var(1, correction=0)
    cov = ((x - x.mean(1, keepdim=True)) * (q - q.mean(1, keepdim=True))).mean(1)
    error = (y - x).square().mean(1)
    floor = var_x - cov**2 * (var_q + 0.02) / (var_q + 0.01) ** 2
    assert ((error - floor) / var_x).abs().max() < 1e-14
    assert bool((error <= var_x).all())


@both
def test_a_block_of_equal_values(mode: str, bits: int) -> None:
    rule, where = made(mode, bits, lam=1e-6)
    for value in (0.0, 3.7, -1e-30, 1e30):
        x = torch.full((2, N), value, dtype=torch.float64)
        pruned = where(x)
        y, v = forward(rule, x, pruned), rule.vjp(torch.randn(2, N, dtype=torch.float64), x, pruned)
        assert bool(torch.isfinite(y).all()) and bool(torch.isfinite(v).all())
        if mode == "affine":
            assert torch.equal(y, x)
        elif mode != "sparse" and value:
            torch.testing.assert_close(y, x, rtol=1e-5, atol=0)


def test_values_on_the_grid_come_back_without_a_penalty() -> None:
    """d = 0 and lam = 0: the ordinary scale and offset."""
    q = torch.tensor([[0.0, 3.0, 1.0, 2.0, 2.0, 0.0]], dtype=torch.float64)
    x = 0.25 * q - 1.5
    fit = Ridge(make_grid(2, symmetric=False), lam=0.0).fit(x, None)
    assert torch.equal(fit.values, q) and fit.offset is not None
    assert float(fit.scale) == pytest.approx(0.25, rel=1e-15) and float(fit.offset) == pytest.approx(-1.5, rel=1e-15)
    signs = torch.tensor([[1.0, -1.0, -1.0, 1.0]], dtype=torch.float64)
    assert float(Ridge(make_grid(1, symmetric=True), lam=0.0).fit(0.3 * signs, None).scale) == pytest.approx(0.3)


def test_one_bit_without_a_penalty_is_the_means_of_the_two_classes() -> None:
    x = torch.randn(20, N, dtype=torch.float64)
    rule = Ridge(make_grid(1, symmetric=False), lam=0.0)
    q, y = rule.fit(x, None).values, forward(rule, x)
    for i in range(len(x)):
        for c in (0, 1):
            members = q[i] == c
            torch.testing.assert_close(y[i, members], x[i, members].mean().expand(int(members.sum())))


@pytest.mark.parametrize(
    ("ones", "n", "k"), [(64, 128, 0.96), (1, 4, 0.95), (1, 10, 0.90), (1, 20, 0.83), (1, 128, 0.44)]
)
def test_how_much_a_penalty_of_a_hundredth_shrinks_one_bit(ones: int, n: int, k: float) -> None:
    x = torch.zeros(1, n, dtype=torch.float64)
    x[0, :ones] = 1.0
    y = forward(Ridge(make_grid(1, symmetric=False), lam=0.01), x)
    p = ones / n
    assert float(y[0, 0] - x.mean()) == pytest.approx(p * (1 - p) / (p * (1 - p) + 0.01) * (1 - p), rel=1e-12)
    assert float(y[0, 0] - y[0, -1]) == pytest.approx(k, abs=0.005)


def test_linear_one_bit_is_the_mean_magnitude() -> None:
    x = torch.randn(9, N, dtype=torch.float64)
    fit = Ridge(make_grid(1, symmetric=True), lam=0.01).fit(x, None)
    torch.testing.assert_close(fit.scale, x.abs().mean(1, keepdim=True) / 1.01, rtol=1e-14, atol=0)


def test_it_is_a_layer_norm_of_the_codes() -> None:
    """y = gamma LN(q) + mean x with epsilon = lam and gamma = Cov / sqrt(Var q + lam)."""
    x = torch.randn(9, N, dtype=torch.float64)
    rule, _ = made("affine", 2)
    q = rule.fit(x, None).values
    centered = q - q.mean(1, keepdim=True)
    gamma = ((x - x.mean(1, keepdim=True)) * centered).mean(1, keepdim=True)
    gamma = gamma / (centered.square().mean(1, keepdim=True) + 0.01).sqrt()
    norm = torch.nn.functional.layer_norm(q, (N,), eps=0.01)
    torch.testing.assert_close(forward(rule, x), gamma * norm + x.mean(1, keepdim=True), rtol=1e-13, atol=1e-14)


def test_an_infinite_penalty_leaves_the_mean() -> None:
    x, u = torch.randn(3, N, dtype=torch.float64), torch.randn(3, N, dtype=torch.float64)
    rule, _ = made("affine", 2, lam=1e18)
    torch.testing.assert_close(forward(rule, x), x.mean(1, keepdim=True).expand_as(x))
    torch.testing.assert_close(rule.vjp(u, x, None), u.mean(1, keepdim=True).expand_as(u))


def test_fine_codes_without_a_penalty_are_straight_through() -> None:
    x, u = torch.randn(3, N, dtype=torch.float64), torch.randn(3, N, dtype=torch.float64)
    rule = Ridge(make_grid(16, symmetric=False), lam=1e-12)
    torch.testing.assert_close(rule.vjp(u, x, None), u, rtol=0, atol=2e-3)


def test_masked_values_move_only_what_all_of_a_row_share() -> None:
    """An outlier beyond the cell of its code: its own code passes no gradient, the fit and the mean of x do."""
    rule, _ = made("affine", 1, absmean=True, mask_clipped=True, detach_range=True)
    x = torch.randn(5, N, dtype=torch.float64)
    x[:, 3] = 9.0
    m, u = rule.moments(x, None), torch.randn_like(x)
    kappa = (u * m.q).mean(1) / m.spread[:, 0]
    torch.testing.assert_close(rule.vjp(u, x, None)[:, 3], u.mean(1) + kappa * m.q[:, 3])
    noise, _ = made("affine", 1, absmean=True, detach_range=True)
    assert bool((noise.vjp(u, x, None) - rule.vjp(u, x, None)).abs().amax(0)[3] > 1e-3)


@pytest.mark.parametrize(("bits", "gain"), [(1, 0.30), (2, 0.78), (4, 0.99)])
def test_how_much_of_the_gradient_passes_within_a_block(bits: int, gain: float) -> None:
    x = torch.randn(2000, 128, dtype=torch.float64)
    slopes = Ridge(make_grid(bits, symmetric=False), lam=0.01).moments(x, None).slope
    assert float(slopes.mean()) == pytest.approx(gain, abs=0.01)
    rule = Ridge(make_grid(bits, symmetric=False), lam=0.01, detach_range=True, gradient="gain")
    u = torch.randn_like(x)
    wanted = u.mean(1, keepdim=True) + slopes * (u - u.mean(1, keepdim=True))
    torch.testing.assert_close(rule.vjp(u, x, None), wanted)


def test_what_is_pruned_learns_and_stays_zero() -> None:
    x, u = torch.randn(5, N, dtype=torch.float64), torch.randn(5, N, dtype=torch.float64)
    rule, where = made("sparse", 1, detach_range=True)
    pruned = where(x)
    assert pruned is not None
    fit, m = rule.fit(x, pruned), rule.moments(x, pruned)
    assert bool((forward(rule, x, pruned)[pruned] == 0).all())
    q = fit.values
    kappa = (u * q).mean(1, keepdim=True) / (q.square().mean(1, keepdim=True) + 0.01)
    wanted = m.slope * u + kappa * x / m.step
    torch.testing.assert_close(rule.vjp(u, x, pruned)[pruned], wanted[pruned], rtol=1e-13, atol=1e-14)


def test_a_dense_and_a_sparse_target_give_the_same_values() -> None:
    """In the linear case <q, x> = <q, xS>, since q is zero where x is pruned."""
    x = torch.randn(5, N, dtype=torch.float64)
    rule, where = made("sparse", 1)
    pruned = where(x)
    assert pruned is not None
    sparse = x.masked_fill(pruned, 0.0)
    assert torch.equal(rule.fit(x, pruned).scale, rule.fit(sparse, pruned).scale)
    scale = sparse.abs().sum(1, keepdim=True) / N / (0.5 + 0.01)
    torch.testing.assert_close(rule.fit(x, pruned).scale, scale, rtol=1e-14, atol=0)
