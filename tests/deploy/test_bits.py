import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.deploy.bits import gather_kept, pack_bits, packed_bytes, scatter_kept, unpack_bits
from fewbits.errors import PackedFileError
from fewbits.plan import Sparsity


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


@given(st.integers(2, 9), st.integers(0, 1), st.data())
def test_sparse_values_and_positions_and_back(of: int, axis: int, data: st.DataObject) -> None:
    pattern = Sparsity(data.draw(st.integers(1, of - 1)), of)
    groups = (3, data.draw(st.integers(0, 3)), of)
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    order = torch.rand(groups, generator=seed).argsort(-1)
    values = (torch.randint(-3, 4, groups, generator=seed) * (order < pattern.kept)).flatten(1)
    values = values.T if axis == 0 else values
    some, positions = gather_kept(values, pattern, axis)
    assert len(some) == len(positions) == pattern.count(values.numel())
    assert bool((positions.reshape(-1, pattern.kept).diff() > 0).all()) and bool((positions < of).all())
    assert torch.equal(scatter_kept(some, positions, pattern, values.shape, axis), values)


def test_layout_of_a_sparse_group() -> None:
    values = torch.tensor([[0, 7, 0, -2, 0, 0, 0, 5]])
    some, positions = gather_kept(values, Sparsity(2, 4), 1)
    assert some.tolist() == [7, -2, 0, 5] and positions.tolist() == [1, 3, 0, 3]  # the first zero fills up


def test_what_does_not_have_the_pattern_is_refused() -> None:
    with pytest.raises(PackedFileError, match="a group of 4 values has 3 other than 0"):
        gather_kept(torch.tensor([1, 1, 0, 1]), Sparsity(2, 4), 0)
    with pytest.raises(PackedFileError, match="position 3 in a group of 3"):
        scatter_kept(torch.tensor([1, 1]), torch.tensor([0, 3]), Sparsity(2, 3), [3], 0)
