"""Initial ranges: from rows of values to a scale and a zero point for each row.

Three searches, by name: ``minmax``, ``percentile`` and ``mse``. All take rows [G, m] and return
(scale [G], zero point [G]); the zero point is 0 on symmetric grids. Zero always has a code of its own on
affine grids, so that padding and ReLU outputs stay exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.quantizers.codes import Grid

TINY = torch.finfo(torch.float32).tiny  # the smallest scale: 1 / scale stays finite
SAMPLE = 1 << 16  # values of a row that a search looks at
SHRINK = torch.logspace(0, -1.5, 40).tolist()  # candidate fractions of the full range


def find_range(
    x: Tensor, grid: Grid, *, symmetric: bool, method: str, percentile: float = 99.9
) -> tuple[Tensor, Tensor]:
    """Return (scale [G], zero point [G]) for rows x [G, m] of any float dtype."""
    x = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    low, high = x.amin(1).clamp(max=0.0), x.amax(1).clamp(min=0.0)
    if method == "percentile":
        half = thin(x) / 2  # the distance of two halves stays finite
        low = 2 * torch.quantile(half, 1 - percentile / 100, dim=1).clamp(max=0.0)
        high = 2 * torch.quantile(half, percentile / 100, dim=1).clamp(min=0.0)
    if method != "mse":
        return from_bounds(low, high, grid, symmetric)
    return _search_mse(thin(x), low, high, grid, symmetric)


def thin(x: Tensor) -> Tensor:
    """Return at most SAMPLE evenly spaced columns of x, always the same ones."""
    return x[:, :: -(-x.shape[1] // SAMPLE)] if x.shape[1] > SAMPLE else x


def largest_scale(grid: Grid) -> float:
    """Return the largest scale with which not only values but also sums of a gradient's products stay finite.

    The outermost code then stands for 1.8e19, the square root of what float32 holds; larger values are clipped.
    """
    return float(torch.finfo(torch.float32).max ** 0.5) / max(grid.highest, -grid.lowest)


def from_bounds(low: Tensor, high: Tensor, grid: Grid, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point whose grid spans low <= 0 <= high.

    A row of zeros gets scale 1, or the smallest one on an odd grid, which has no zero of its own.
    """
    if symmetric:
        scale, zero = torch.maximum(-low / -grid.lowest, high / grid.highest), torch.zeros_like(low)
    else:
        steps = grid.highest - grid.lowest
        scale = high / steps - low / steps
    of_zeros = 1.0 if grid.step == 1 else TINY
    scale = torch.where(scale > 0, scale.clamp(TINY, largest_scale(grid)), of_zeros)
    if not symmetric:
        zero = (grid.lowest - torch.round(low / scale)).clamp(grid.lowest, grid.highest)
    return scale, zero


def quantize_rows(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, out: Tensor | None = None) -> Tensor:
    """Return codes minus zero point for rows x [G, m], as floats: round to the grid, then clamp.

    scale, zero: [G, 1]. Ties go to the even neighbour, as in ONNX QuantizeLinear. out: where to write (of the
    dtype of scale, and without gradients).
    """
    centered = torch.div(x, scale, out=out)
    if grid.step == 2:  # the nearest odd integer; zero goes to +1
        centered.sub_(1.0).div_(2.0).round_().mul_(2.0).add_(1.0)
    else:
        centered.round_()
    if zero is None:
        return centered.clamp_(grid.lowest, grid.highest)
    if on_host(zero):  # numbers make a faster kernel than tensors do
        number = zero.item()
        return centered.clamp_(grid.lowest - number, grid.highest - number)
    return centered.clamp_(grid.lowest - zero, grid.highest - zero)


def on_host(value: Tensor) -> bool:
    """Tell whether one number can be read without making an accelerator or a compiler wait for it."""
    return value.numel() == 1 and value.device.type == "cpu" and not torch.compiler.is_compiling()


def _search_mse(x: Tensor, low: Tensor, high: Tensor, grid: Grid, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Try fractions of the full range, and keep for each row the one with the least squared error."""
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = from_bounds(low, high, grid, symmetric)
    for fraction in SHRINK:
        scale, zero = from_bounds(low * fraction, high * fraction, grid, symmetric)
        for _ in range(2):
            q = quantize_rows(x, scale[:, None], zero[:, None], grid)
            error = (q * scale[:, None] - x).square().mean(1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
            if not symmetric:
                break
            fit = (q * x).sum(1) / q.square().sum(1)  # the least-squares scale for these codes
            scale = torch.where((fit >= TINY) & (fit <= largest_scale(grid)), fit, scale)
    return best_scale, best_zero
