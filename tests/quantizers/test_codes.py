"""Grids and codes."""

from __future__ import annotations

import pytest
import torch

from fewbits.quantizers.codes import Codes, cast, make_grid
from fewbits.quantizers.grouping import Grouping


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize(
    "kind",
    [{"symmetric": False}, {"symmetric": True}, {"symmetric": True, "narrow": True}, {"symmetric": True, "odd": True}],
)
def test_every_value_has_an_index_below_two_to_the_bits_and_back(bits: int, kind: dict[str, bool]) -> None:
    grid = make_grid(bits, **kind)
    values = torch.arange(grid.lowest, grid.highest + 1, grid.step)
    index = grid.index(values)
    assert torch.equal(index, torch.arange(len(values)))
    assert 2 <= len(values) <= 2**bits and grid.bits == bits
    assert torch.equal(grid.value(index), values)
    if kind.get("odd") or kind.get("narrow"):
        assert grid.lowest == -grid.highest


def test_one_symmetric_bit_is_plus_and_minus_one() -> None:
    grid = make_grid(1, symmetric=True)
    assert grid.value(torch.tensor([0, 1])).tolist() == [-1, 1]


def test_decode_is_values_minus_zero_point_times_scale_plus_offset() -> None:
    codes = Codes(
        values=torch.tensor([[0, 3], [1, 2]], dtype=torch.int32),
        scale=torch.tensor([0.5, 2.0]),
        zero_point=torch.tensor([1, 0], dtype=torch.int32),
        offset=torch.tensor([0.25, 0.0]),
        grid=make_grid(2, symmetric=False),
        grouping=Grouping("channel"),
        dtype=torch.float16,
    )
    assert codes.decode().tolist() == [[-0.25, 1.25], [2.0, 4.0]]
    assert codes.decode().dtype == torch.float16 and codes.bits == 2


def test_half_precision_saturates() -> None:
    x = torch.tensor([1e6, -1e6, 3.0])
    assert cast(x, torch.float16).tolist() == [65504.0, -65504.0, 3.0]
    assert cast(x, torch.float32) is x
