"""Groupings: rows and back, for every axis, block size and shape; who shares a scale with whom."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.errors import QuantizationError
from fewbits.quantizers import Grouping


@st.composite
def groupings(draw: st.DrawFn) -> tuple[Grouping, tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)))
    granularity = draw(st.sampled_from(("tensor", "channel", "block", "head")))
    axis, contraction = (draw(st.integers(-len(shape), len(shape) - 1)) for _ in range(2))
    block = draw(st.integers(1, 9)) if granularity == "block" else None
    return Grouping(granularity, axis, contraction, block), shape


@given(groupings())
def test_merge_undoes_rows_and_count_counts_them(given: tuple[Grouping, tuple[int, ...]]) -> None:
    grouping, shape = given
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    parts = grouping.rows(x)
    assert torch.equal(grouping.merge(parts, shape), x)
    assert sum(len(p) for p in parts) == grouping.count(shape)
    columns = grouping.split(torch.arange(grouping.count(shape)), parts)
    assert [c.shape for c in columns] == [(len(p), 1) for p in parts]


def test_a_channel_shares_one_scale() -> None:
    x = torch.arange(24).reshape(2, 3, 4)
    (rows,) = Grouping("channel", axis=1).rows(x)
    assert [r.tolist() for r in rows] == [x[:, c].flatten().tolist() for c in range(3)]
    assert torch.equal(Grouping("head", axis=1).rows(x)[0], rows)


def test_blocks_run_along_the_contraction_and_the_tail_is_shorter() -> None:
    x = torch.arange(10).reshape(2, 5)
    whole, tail = Grouping("block", contraction=1, block=2).rows(x)
    assert whole.tolist() == [[0, 1], [2, 3], [5, 6], [7, 8]]
    assert tail.tolist() == [[4], [9]]
    (only,) = Grouping("block", contraction=1, block=7).rows(x)
    assert only.tolist() == x.tolist()
    kernel = torch.arange(8).reshape(1, 4, 2)  # [out, in, tap]: a block stays inside a tap
    (rows,) = Grouping("block", contraction=1, block=2).rows(kernel)
    assert rows.tolist() == [[0, 2], [4, 6], [1, 3], [5, 7]]


def test_a_wrong_number_of_scales_is_a_named_error() -> None:
    grouping = Grouping("channel")
    with pytest.raises(QuantizationError, match=r"3 groups \(channel\), the quantizer holds 2 scales"):
        grouping.split(torch.ones(2), grouping.rows(torch.ones(3, 4)))


@pytest.mark.parametrize(
    "grouping", [Grouping("block", 0, 1, 4), Grouping("block", 1, 1, 64), Grouping("channel", 1), Grouping()]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_views_are_the_rows_in_place(grouping: Grouping, layout: torch.memory_format) -> None:
    x = torch.randn(3, 10, 4, 5).to(memory_format=layout)
    viewable = grouping.viewable(x)
    assert torch.equal(viewable, x)
    for view, row in zip(grouping.views(viewable), grouping.rows(x), strict=True):
        assert torch.equal(view.flatten(0, -2), row)
        assert view.untyped_storage().data_ptr() == viewable.untyped_storage().data_ptr()
    if grouping.granularity == "block":
        assert viewable is x
