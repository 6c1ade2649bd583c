"""The affine matmul shortcut: a product of affine codes is one integer product and one small float product.

With x = a q + b in every block, the sum over a block is a_x a_w (q_x . q_w) + b_x (a_w sum q_w) + (sum x) b_w. The
last two terms of all blocks together are one product of inner size 2 G, G blocks: next to n integer products that is
2 / k float ones, for blocks of k. Where offsets are those of the ridge (b = mean x - a mean q) the terms are the
rank-1 corrections of "Robust Training of Neural Networks at Arbitrary Precision and Sparsity"; the form here holds for
any offsets, and for a last block that is shorter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fewbits.errors import QuantizationError
from fewbits.quantizers import Codes

EXACT_FLOAT32 = 1 << 24  # integers up to here are float32 numbers


@dataclass(frozen=True)
class Operand:
    """Rows of codes, cut to blocks along the contraction axis: row[j] = codes[j] * scale[j // block] + offset.

    codes: [R, n] int8. scale, offset (or None): [R, G], G = ceil(n / block). largest: of the magnitudes of codes.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    block: int
    largest: int

    @property
    def widths(self) -> Tensor:
        """The length of each block, [G], as floats."""
        starts = torch.arange(self.scale.shape[1], device=self.scale.device) * self.block
        return (self.codes.shape[1] - starts).clamp(max=self.block).to(self.scale.dtype)

    @cached_property
    def sums(self) -> Tensor:
        """The sum of the real values in each block but for the offset, [R, G]; of a weight it is found once."""
        parts = torch.split(self.codes, self.block, dim=1)
        return torch.stack([part.sum(1, dtype=torch.int32) for part in parts], 1) * self.scale

    def cut(self, block: int) -> Operand:
        """Return the same in smaller blocks. Raises QuantizationError unless ``block`` divides ours."""
        if block == self.block:
            return self
        groups = -(-self.codes.shape[1] // block)
        if self.block % block and self.scale.shape[1] > 1:
            raise QuantizationError(
                f"blocks of {self.block} and of {block} do not fit: give both operands one size, or one that divides"
            )
        which = torch.arange(groups, device=self.scale.device) * block // self.block
        offset = None if self.offset is None else self.offset[:, which]
        return replace(self, scale=self.scale[:, which], offset=offset, block=block)


def operand(codes: Codes) -> Operand:
    """Return codes of a tensor [..., n] as an operand that is contracted over its last axis.

    Unsigned codes move down by half their range, and their zero point up into the offset, so that all fit into int8.
    Raises QuantizationError where they do not (odd grids of 8 bits), or where scales run along the contraction axis in
    another way than by blocks.
    """
    grouping, grid, values = codes.grouping, codes.grid, codes.values
    length, rows = values.shape[-1], values[..., 0].numel()
    blocked = grouping.block is not None and grouping.contraction % values.ndim == values.ndim - 1
    if not blocked and grouping.granularity != "tensor" and (grouping.block or grouping.axis or values.ndim != 2):
        raise QuantizationError(
            f"scales per {grouping.granularity} along axis {grouping.axis} cannot leave the product: quantize the "
            "input per tensor or in blocks, the weight per tensor, per channel or in blocks"
        )
    if max(abs(grid.lowest), grid.highest) > 128 and grid.lowest < 0:
        raise QuantizationError(f"codes of {grid.lowest}..{grid.highest} do not fit into int8: use fewer bits")
    block = min(grouping.block, length) if blocked and grouping.block else length

    def by_row(per_row: Tensor) -> Tensor:
        """Bring one value a block, whole blocks first and then the shorter ones, to [R, G]."""
        if not blocked:
            return per_row[:, None].expand(rows, 1)
        whole = length // block
        rest = -(-length // block) - whole  # in full: of no rows, -1 could be anything
        return torch.cat([per_row[: rows * whole].reshape(rows, whole), per_row[rows * whole :].reshape(rows, rest)], 1)

    scale = by_row(codes.scale)
    offset = None if codes.offset is None else by_row(codes.offset)
    shift = 2 ** (grid.bits - 1) if grid.lowest >= 0 else 0
    if codes.zero_point is not None or shift:
        zero = 0 if codes.zero_point is None else by_row(codes.zero_point)
        offset = (shift - zero) * scale + (0 if offset is None else offset)
    largest = max(abs(grid.lowest - shift), abs(grid.highest - shift))
    return Operand((values.reshape(rows, length) - shift).to(torch.int8), scale, offset, block, largest)


def affine_matmul(x: Operand, weight: Operand) -> Tensor:
    """Return the product x weight^T of what the codes stand for, [R, M], in the dtype of the scales.

    Equal to the product of the decoded matrices but for float rounding; the integer part is exact. Raises
    QuantizationError where the lengths differ, or the blocks do not fit.
    """
    if x.codes.shape[1] != weight.codes.shape[1]:
        raise QuantizationError(
            f"cannot contract {x.codes.shape[1]} values with {weight.codes.shape[1]}: give both one length"
        )
    block = min(x.block, weight.block)
    x, weight = x.cut(block), weight.cut(block)
    out = corrections(x, weight)
    pairs = zip(torch.split(x.codes, block, 1), torch.split(weight.codes, block, 1))
    for group, (left, right) in enumerate(pairs):
        product = integer_product(left, right, x.largest * weight.largest).to(out.dtype)
        out.addcmul_(product.mul_(x.scale[:, group, None]), weight.scale[:, group])
    return out


def corrections(x: Operand, weight: Operand) -> Tensor:
    """Return what the offsets add to the product of the codes, [R, M]: one product of inner size 2 G, G or nothing."""
    left, right = [], []
    if x.offset is not None:
        left.append(x.offset)
        right.append(weight.sums)
    if weight.offset is not None:
        left.append(x.sums if x.offset is None else x.sums + x.offset * x.widths)
        right.append(weight.offset)
    if not left:
        return torch.zeros(len(x.codes), len(weight.codes), dtype=x.scale.dtype, device=x.scale.device)
    return torch.cat(left, 1) @ torch.cat(right, 1).T


def integer_product(x: Tensor, weight: Tensor, largest: int) -> Tensor:
    """Return x weight^T of int8 matrices [R, n] and [M, n], exact, in whatever type that took.

    largest: a bound of the single products. A GPU multiplies int8; a CPU does it fastest in floats, which hold the
    sums exactly (PyTorch's int8 product is up to a hundred times slower there).
    """
    if x.is_cuda:
        return _int_mm(x, weight)
    dtype = torch.float32 if largest * x.shape[1] < EXACT_FLOAT32 else torch.float64
    return x.to(dtype) @ weight.to(dtype).T


def _int_mm(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply on tensor cores, whose kernels ask for more than 16 rows and for lengths in eights."""
    rows, columns = len(x), len(weight)
    pad = torch.nn.functional.pad
    x = pad(x, (0, -x.shape[1] % 8, 0, max(0, 17 - rows)))
    weight = pad(weight, (0, -weight.shape[1] % 8, 0, -columns % 8))
    return torch._int_mm(x, weight.T)[:rows, :columns]
