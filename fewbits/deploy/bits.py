"""Dense bit streams: codes of 1 to 8 (and 16) bits without a wasted bit, whatever the width; N:M sparse ones as the
codes that are left and their positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbits.errors import PackedFileError
from fewbits.plan import Sparsity


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack_bits(index: Tensor, bits: int) -> Tensor:
    """Pack indices 0..2**bits - 1 of any shape into a uint8 vector, least significant bit first.

    Eight codes fill exactly ``bits`` bytes; the last byte is padded with zeros.
    """
    flat = index.reshape(-1).to(torch.int64)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < 2**bits:
        raise PackedFileError(f"codes must lie in 0..{2**bits - 1}, got {int(flat.min())}..{int(flat.max())}")
    if bits > 8:
        return flat.to(torch.uint16).view(torch.uint8)
    groups = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).reshape(-1, 8)
    words = (groups << _shifts(bits)).sum(1)
    stream = words.view(torch.uint8).reshape(-1, 8)[:, :bits].reshape(-1)
    return stream[: packed_bytes(flat.numel(), bits)].clone()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first ``count`` codes of a packed stream as an int64 vector."""
    if packed.numel() != packed_bytes(count, bits):
        raise PackedFileError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, the stream has {packed.numel()}"
        )
    if bits > 8:
        return packed.view(torch.uint16).to(torch.int64)
    stream = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).reshape(-1, bits)
    words: Tensor = torch.nn.functional.pad(stream, (0, 8 - bits)).view(torch.int64)
    index: Tensor = (words >> _shifts(bits)) & (2**bits - 1)
    return index.reshape(-1)[:count]


def pack_rows(rows: Tensor, widths: Sequence[int]) -> Tensor:
    """Pack symmetric codes [G, m], -(2^(b - 1) - 1) .. 2^(b - 1) - 1 in a row of b bits, each row at its own width.

    The rows of one width are one stream of ``pack_bits``, in their order; the narrowest come first.
    """
    width = torch.tensor(widths)
    return torch.cat([pack_bits(rows[width == b] + (2 ** (b - 1) - 1), b) for b in sorted(set(widths))])


def unpack_rows(packed: Tensor, widths: Sequence[int], length: int) -> Tensor:
    """Undo ``pack_rows`` for rows of ``length`` codes: int32 [G, length]."""
    width, rows, start = torch.tensor(widths), torch.empty(len(widths), length, dtype=torch.int32), 0
    need = {b: widths.count(b) * length for b in sorted(set(widths))}
    total = sum(packed_bytes(count, b) for b, count in need.items())
    if packed.numel() != total:
        raise PackedFileError(f"rows of {need} codes by width take {total} bytes, the stream has {packed.numel()}")
    for b, count in need.items():
        end = start + packed_bytes(count, b)
        index = unpack_bits(packed[start:end].clone(), b, count).to(torch.int32)
        rows[width == b] = (index - (2 ** (b - 1) - 1)).reshape(-1, length)
        start = end
    return rows


def gather_kept(values: Tensor, pattern: Sparsity, axis: int) -> tuple[Tensor, Tensor]:
    """Return the N kept values of each group of M along ``axis``, and their positions 0..M - 1 in increasing order.

    Both are vectors, groups in the order of the tensor with ``axis`` last. What is not 0 is kept; where that is fewer
    than N, the first zeros fill up. Raises PackedFileError where it is more than N.
    """
    moved = values.movedim(axis, -1)
    groups = moved.reshape(*moved.shape[:-1], moved.shape[-1] // pattern.of, pattern.of)
    most = int((groups != 0).sum(-1).max()) if groups.numel() else 0
    if most > pattern.kept:
        raise PackedFileError(f"a group of {pattern.of} values has {most} other than 0: that is not {pattern} sparse")
    first = torch.sort((groups == 0).to(torch.uint8), dim=-1, stable=True).indices[..., : pattern.kept]
    positions = torch.sort(first, dim=-1).values
    return groups.gather(-1, positions).reshape(-1), positions.reshape(-1)


def scatter_kept(values: Tensor, positions: Tensor, pattern: Sparsity, shape: Sequence[int], axis: int) -> Tensor:
    """Undo ``gather_kept`` for a tensor of the given shape. Raises PackedFileError for a position that is none."""
    moved = list(shape)
    moved.append(moved.pop(axis))
    if positions.numel() and int(positions.max()) >= pattern.of:
        raise PackedFileError(f"position {int(positions.max())} in a group of {pattern.of}: the stream is damaged")
    groups = values.new_zeros((*moved[:-1], moved[-1] // pattern.of, pattern.of))
    slots = (*groups.shape[:-1], pattern.kept)
    return groups.scatter_(-1, positions.reshape(slots), values.reshape(slots)).flatten(-2).movedim(-1, axis)


def _shifts(bits: int) -> Tensor:
    return torch.arange(8, dtype=torch.int64) * bits
