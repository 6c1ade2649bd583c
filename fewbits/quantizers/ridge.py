"""Ridge dequantization, the maths of the denoising quantizer ("Robust Training of Neural Networks at Arbitrary
Precision and Sparsity", arXiv 2409.09245).

Rows x [G, N] become codes q = f + d with f = (x - b_f) / s_f (affine) or x / s_f (linear) and the rounding error d, a
constant of the graph. The dequantizer is the ridge regression of x on q, in closed form (our algebra from the paper's
objective ``min 1/(2N) |s_g q + b_g - x|^2 + lam/2 s_g^2``):

    affine   y = a (q - mean q) + mean x,   a = Cov(x, q) / (Var q + lam)
    linear   y = a q,                       a = mean(q x) / (mean q^2 + lam)

Means are over the row (1/N). a and the means depend on q and stay in the graph, so the gradient sees the error.
``denoise`` says this in plain autograd and is what tests hold ``Ridge`` against; ``Ridge`` has the gradient in closed
form and saves nothing but x. It computes in steps of the grid, x = b_f + s_f f, so that tiny and huge values are alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot

from fewbits.quantizers.codes import Grid
from fewbits.quantizers.dynamic import (
    BEST_STEP,
    HUGE,
    Fit,
    Rule,
    bounded,
    largest,
    mean_magnitude,
    spread,
    spread_around_mean,
    to_grid,
)
from fewbits.quantizers.ranges import TINY
from fewbits.quantizers.sparsity import prune


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of rows [..., m], as [..., 1]."""
    product: Tensor = vecdot(a, b)
    return product.unsqueeze(-1)


def at_end(distance: Tensor) -> Tensor:
    """Return rows that add up to 1 where the distance (0 or more; overwritten) is 0, and are 0 elsewhere."""
    away = distance.sign_()
    count = (away.shape[-1] - away.sum(-1, keepdim=True)).clamp_(min=1.0)
    return away.sub_(1.0).div_(-count)


def denoise(
    x: Tensor,
    grid: Grid,
    lam: float,
    *,
    pruned: Tensor | None = None,
    absmean: bool = False,
    detach_range: bool = False,
    detach_slope: bool = False,
    mask_clipped: bool = False,
) -> Tensor:
    """Return rows x [G, N] through quantizer and ridge dequantizer, on plain autograd.

    A grid of 0..highest is affine, others are linear. pruned [G, N] (linear only): zero before the quantizer, an error
    that is detached like d; the target of the regression stays the dense x. mask_clipped: no gradient through the codes
    of values beyond the cells of the outermost ones.
    """
    if grid.lowest == 0:
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        step = ((high - low) / grid.highest).clamp(min=TINY)
        if absmean:
            mean = x.mean(1, keepdim=True)
            step = (BEST_STEP[grid.bits] * (x - mean).abs().mean(1, keepdim=True)).clamp(min=TINY)
            low = mean - step * grid.highest / 2
        low, step = (low.detach(), step.detach()) if detach_range else (low, step)
        f = (x - low) / step
        if mask_clipped:
            f = torch.where((f >= -0.5) & (f <= grid.highest + 0.5), f, f.detach())
        q = f + (f.round().clamp(0, grid.highest) - f).detach()
        centered, target = q - q.mean(1, keepdim=True), x - x.mean(1, keepdim=True)
        a = (centered * target).mean(1, keepdim=True) / (centered.square().mean(1, keepdim=True) + lam)
        return (a.detach() if detach_slope else a) * centered + x.mean(1, keepdim=True)
    xs = x if pruned is None else x + (x.masked_fill(pruned, 0.0) - x).detach()
    size = xs.abs()
    step = (size.mean(1, keepdim=True) if absmean else size.amax(1, keepdim=True)) / grid.highest
    step = step.clamp(min=TINY)
    f = xs / (step.detach() if detach_range else step)
    if mask_clipped:
        f = torch.where(f.abs() <= grid.highest + grid.step / 2, f, f.detach())
    codes = to_grid(f.detach(), grid)
    q = f + (codes if pruned is None else codes.masked_fill(pruned, 0.0)) - f.detach()
    a = (q * x).mean(1, keepdim=True) / (q.square().mean(1, keepdim=True) + lam)
    return (a.detach() if detach_slope else a) * q


class Moments(NamedTuple):
    """Of rows, in steps of the grid: f and q [..., m], centered where affine (mean_f, mean_q [..., 1] are their means);
    step and low with x = low + step * f; slope = a / step; variance + lam of q."""

    f: Tensor
    q: Tensor
    mean_f: Tensor | None
    mean_q: Tensor | None
    step: Tensor
    low: Tensor | None
    slope: Tensor
    spread: Tensor


@dataclass(frozen=True)
class Ridge(Rule):
    """Codes by f, ridge dequantizer, and the vector-Jacobian product in closed form.

    gradient: "denoise" (everything), "gain" (the slope a is detached) or "ste" (identity on the same forward).
    mask_clipped: no gradient through the codes of what lies beyond the cells of the outermost ones.
    """

    lam: float = 0.01
    absmean: bool = False
    detach_range: bool = False
    gradient: str = "denoise"
    mask_clipped: bool = False

    @property
    def affine(self) -> bool:
        """Tell whether there is an offset: codes 0..highest."""
        return self.grid.lowest == 0

    @property
    def straight_through(self) -> bool:
        """Tell whether ``vjp`` returns the gradient as it came."""
        return self.gradient == "ste"

    def fit(self, x: Tensor, pruned: Tensor | None) -> Fit:
        """Return codes, slope a and offset mean(x) - a mean(q)."""
        m = self.moments(x, pruned)
        scale = m.step * m.slope
        if m.low is None:
            return Fit(m.q, scale.clamp_(TINY, HUGE / self.grid.highest), None)
        assert m.mean_f is not None and m.mean_q is not None
        offset = m.low + m.step * (m.mean_f - m.slope * m.mean_q)
        return Fit(m.f.round_().clamp_(0, self.grid.highest), *bounded(scale, offset, self.grid))

    def moments(self, x: Tensor, pruned: Tensor | None) -> Moments:
        """Return the statistics of rows x: means first, then centered second moments. In the affine case f is as it is,
        in memory of its own, and q is centered; in the linear case q holds the codes, and f is the dense x in steps.
        """
        n = x.shape[-1]
        low = mean_f = mean_q = None
        if self.affine:
            f, step, low = spread_around_mean(x, self.grid) if self.absmean else spread(x, self.grid)
            q = f.round().clamp_(0, self.grid.highest) if self.absmean else f.round()
            mean_f, mean_q = f.mean(-1, keepdim=True), q.mean(-1, keepdim=True)
            q.sub_(mean_q)
        else:
            step = self.linear_step(x, pruned)
            f = x / step
            q = to_grid(f, self.grid)
            q = prune(q, pruned)
        total = dot(q, q) / n + self.lam
        return Moments(f, q, mean_f, mean_q, step, low, dot(q, f) / n / total, total)

    def linear_step(self, x: Tensor, pruned: Tensor | None) -> Tensor:
        """Return s_f of the linear mode, [..., 1]: max|x| / M, or mean|x| / M of what is not pruned and zeros else."""
        if not self.absmean:
            return (largest(x) / self.grid.highest).clamp_(min=TINY)  # the largest is never pruned
        return mean_magnitude(prune(x, pruned))

    def vjp(self, grad: Tensor, x: Tensor, pruned: Tensor | None) -> Tensor:
        """Return v = J^T u, with d and the pruning error held constant (our derivation).

        v = mean u + (c (u - mean u) + kappa (f~ - 2 c q~)) + kappa q~, where c = a / s_f, kappa = mean(u q~) / (Var q +
        lam) and ~ is centered; in the linear case nothing is, and mean u is 0. The bracket comes through q. To it comes
        dL/ds_f times the derivative of the range, unless that is detached.
        """
        m, u = self.moments(x, pruned), grad
        f, q, c = m.f, m.q, m.slope
        kappa = torch.zeros_like(c) if self.gradient == "gain" else dot(u, q) / x.shape[-1] / m.spread
        inside = self._inside(prune(f, pruned)) if self.mask_clipped else None
        through_q = q.mul(-2 * kappa * c).addcmul_(u, c)  # dL/dq / s_f
        level = None  # of the gradient of a row
        if m.mean_f is not None:
            f.sub_(m.mean_f)
            level = u.mean(-1, keepdim=True)
            through_q.sub_(c * level)
        through_q.addcmul_(f, kappa)
        if inside is not None:
            through_q.mul_(inside)
            if level is not None and not self.detach_range:
                level = level - through_q.mean(-1, keepdim=True)  # by the threshold, which is the mean of x
        steps = None if self.detach_range else torch.where(m.step > TINY, -dot(through_q, prune(f, pruned)), 0.0)
        v = through_q.addcmul_(q, kappa)
        if level is not None:
            v.add_(level)
        return v if steps is None else self._add_range(v, x, pruned, steps)

    def _inside(self, f: Tensor) -> Tensor:
        """Return where f, in steps, is within the cells of the codes."""
        middle = (self.grid.highest + self.grid.lowest) / 2
        return (f - middle).abs_() <= self.grid.highest - middle + self.grid.step / 2

    def _add_range(self, v: Tensor, x: Tensor, pruned: Tensor | None, gradient: Tensor) -> Tensor:
        """Add dL/ds_f ds_f/dx to v, in place. Values that are the largest alike share its gradient."""
        if self.affine and self.absmean:
            sign = (x - x.mean(-1, keepdim=True)).sign_()
            sign.sub_(sign.mean(-1, keepdim=True))
            return v.addcmul_(sign, gradient * (BEST_STEP[self.grid.bits] / x.shape[-1]))
        share = gradient / self.grid.highest
        if self.affine:
            v.addcmul_(at_end(x.amax(-1, keepdim=True) - x), share)
            return v.addcmul_(at_end(x - x.amin(-1, keepdim=True)), -share)
        if self.absmean:
            return v.addcmul_(prune(x.sign(), pruned), share / x.shape[-1])
        return v.addcmul_(at_end(largest(x) - x.abs()).mul_(x.sign()), share)
