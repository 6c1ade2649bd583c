"""Codes: a quantized tensor as integers with what is needed to decode them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.plan import Sparsity
from fewbits.quantizers.grouping import Grouping


@dataclass(frozen=True)
class Grid:
    """The integers that a code may take: ``lowest, lowest + step, ..`` with ``2 ** bits`` values at most.

    Step 2 is the odd (mid-rise) grid, e.g. {-3, -1, 1, 3}; at one bit it is {-1, 1}.
    """

    bits: int
    lowest: int
    highest: int
    step: int = 1

    def index(self, values: Tensor) -> Tensor:
        """Return values as indices 0..2**bits - 1, as they are stored."""
        return (values - self.lowest) // self.step

    def value(self, index: Tensor) -> Tensor:
        """Undo ``index``."""
        return index * self.step + self.lowest


def make_grid(bits: int, *, symmetric: bool, narrow: bool = False, odd: bool = False) -> Grid:
    """Return the grid of a width: signed where symmetric, else 0..2**bits - 1.

    narrow leaves out the lowest code, so that the grid mirrors around zero. odd takes odd integers only.
    One symmetric bit is always odd: {-1, 1}.
    """
    if not symmetric:
        return Grid(bits, 0, 2**bits - 1)
    if odd or bits == 1:
        return Grid(bits, 1 - 2**bits, 2**bits - 1, step=2)
    half = 2 ** (bits - 1)
    return Grid(bits, 1 - half if narrow else -half, half - 1)


@dataclass(frozen=True)
class Codes:
    """A quantized tensor.

    values: integers of the tensor's shape, each on the grid, or 0 where pruned. scale, zero_point, offset: one value a
    row of the grouping ([G]). ``decode`` is ``(values - zero_point) * scale + offset``, computed in float32 (float64
    for float64 tensors) and cast to dtype. sparsity: the N:M pattern along the contraction axis: no group of M has
    more than N values other than 0, also on an odd grid, which has no 0 of its own. There is no zero point or offset
    then. channel_bits: width of each row where they differ; the grid is that of the widest.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None
    offset: Tensor | None
    grid: Grid
    grouping: Grouping
    dtype: torch.dtype
    sparsity: Sparsity | None = None
    channel_bits: tuple[int, ...] | None = None

    @property
    def bits(self) -> int:
        """Width of a code in bits, of the widest where they differ."""
        return self.grid.bits

    def decode(self) -> Tensor:
        """Return the real tensor that the codes stand for."""
        parts = self.grouping.rows(self.values)
        scales = self.grouping.split(self.scale, parts)
        zeros = [None] * len(parts) if self.zero_point is None else self.grouping.split(self.zero_point, parts)
        offsets = [None] * len(parts) if self.offset is None else self.grouping.split(self.offset, parts)
        real = []
        for values, scale, zero, offset in zip(parts, scales, zeros, offsets):
            centered = values if zero is None else values - zero.to(values.dtype)
            product = centered.to(scale.dtype) * scale
            real.append(cast(product if offset is None else product + offset, self.dtype))
        return self.grouping.merge(real, self.values.shape)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to dtype; half precision saturates instead of overflowing to infinity."""
    if dtype == torch.float16 and x.dtype != dtype:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)
