import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.deploy.bits import pack_bits, packed_bytes, unpack_bits
from fewbits.errors import PackedFileError


@given(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 16]), st.integers(0, 100), st.integers(0, 2**31))
def test_round_trip_without_a_wasted_byte(bits: int, count: int, seed: int) -> None:
    index = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(index, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, count), index)


def test_layout_is_a_little_endian_bit_stream() -> None:
    assert pack_bits(torch.tensor([1, 2, 3, 0, 7]), 3).tolist() == [0b11_010_001, 0b0_111_000_0]


def test_codes_outside_their_width_are_refused() -> None:
    with pytest.raises(PackedFileError, match=r"0\.\.3, got 0\.\.4"):
        pack_bits(torch.tensor([0, 4]), 2)


def test_a_stream_of_another_length_is_refused() -> None:
    with pytest.raises(PackedFileError, match="take 2 bytes, the stream has 1"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), 2, 5)
