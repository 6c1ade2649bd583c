"""Dense bit streams: codes of 1 to 8 (and 16) bits without a wasted bit, whatever the width."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import PackedFileError


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


def _shifts(bits: int) -> Tensor:
    return torch.arange(8, dtype=torch.int64) * bits
