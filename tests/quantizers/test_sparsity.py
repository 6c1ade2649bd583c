"""N:M sparsity: what is pruned, that it learns, and who can have it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.errors import PlanError
from fewbits.plan import LayerPlan, Sparsity, TensorPlan
from fewbits.quantizers import Quantizer, make_quantizer
from fewbits.quantizers.sparsity import find_pruned


def build(bits: int, quantizer: str, shape: tuple[int, ...] = (6, 8), **fields: Any) -> Quantizer:
    given = {"granularity": "channel", "sparsity": "2:4"} | fields
    return make_quantizer(TensorPlan(bits, quantizer, **given), shape=shape)


@given(st.integers(2, 12), st.data())
def test_the_largest_of_each_group_stay_and_ties_go_to_the_lower_index(of: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, of - 1))
    x = torch.tensor(data.draw(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0]), min_size=of, max_size=of)))
    order = sorted(range(of), key=lambda i: (-abs(float(x[i])), i))
    wanted = [i not in order[:kept] for i in range(of)]
    assert find_pruned(x, Sparsity(kept, of), 0).tolist() == wanted


def test_groups_run_along_the_axis_inside_a_tap() -> None:
    x = torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.1, 0.4, 0.2, 0.3]]).T[None, :, :]  # [out, in, tap]
    pruned = find_pruned(x, Sparsity(2, 4), 1)
    assert pruned[0, :, 0].tolist() == [False, True, False, True]
    assert pruned[0, :, 1].tolist() == [True, False, True, False]


def test_as_many_groups_as_sorting_finds() -> None:
    x = torch.randn(5, 64, 3)
    for pattern in (Sparsity(1, 2), Sparsity(2, 8), Sparsity(3, 64)):
        groups = x.movedim(1, -1).reshape(5, 3, -1, pattern.of).abs()
        best = groups.topk(pattern.kept, -1).indices
        wanted = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, best, False).reshape(5, 3, 64).movedim(-1, 1)
        assert torch.equal(find_pruned(x, pattern, 1), wanted)


WITH_BITS = [("paretoq", 1), *((name, bits) for name in ("ste", "lsq", "denoise", "dynamic") for bits in (1, 2, 4))]


@pytest.mark.parametrize(("quantizer", "bits"), WITH_BITS)
def test_pruned_weights_are_zero_and_go_on_learning(quantizer: str, bits: int) -> None:
    x = torch.randn(6, 8)
    q = build(bits, quantizer)
    q.calibrate(x)
    x.requires_grad_()
    y = q(x)
    pruned = q.pruned(x)
    assert pruned is not None and int(pruned.sum()) == 24
    assert bool((y[pruned] == 0).all())
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(x))
    assert bool((grad[pruned] != 0).all())
    codes = q.encode(x.detach())
    assert str(codes.sparsity) == "2:4" and torch.equal(codes.decode(), y)
    if bits == 1:
        assert sorted(codes.values.unique().tolist()) == [-1, 0, 1]
        assert not bool((codes.values[~pruned] == 0).any())


def test_a_kept_zero_of_one_bit_is_plus_one() -> None:
    x = torch.zeros(1, 4)
    assert build(1, "denoise", shape=(1, 4)).encode(x).values.tolist() == [[1, 1, 0, 0]]


def test_pruning_is_decided_anew_at_every_call() -> None:
    q = build(4, "lsq", shape=(1, 4))
    q.calibrate(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert (q(torch.tensor([[1.0, 2.0, 3.0, 4.0]])) == 0).tolist() == [[True, True, False, False]]
    assert (q(torch.tensor([[4.0, 3.0, 2.0, 1.0]])) == 0).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_lsq_learns_as_if_pruned_weights_were_zeros_with_a_straight_gradient(bits: int, odd: bool) -> None:
    x, u = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    q: Any = build(bits, "lsq", options={"odd": odd})
    q.double().calibrate(x)
    dense: Any = make_quantizer(TensorPlan(bits, "lsq", granularity="channel", options={"odd": odd}), shape=(6, 8))
    dense.double().calibrate(x)
    with torch.no_grad():
        q.scale.mul_(0.7)
        dense.scale.copy_(q.scale)
    pruned = q.pruned(x)
    x.requires_grad_()
    got_x, got_scale = torch.autograd.grad(q(x), [x, q.scale], u)
    sparse_u = u.masked_fill(pruned, 0.0)
    want_x, want_scale = torch.autograd.grad(dense(x), [x, dense.scale], sparse_u)
    torch.testing.assert_close(got_scale, want_scale)
    assert torch.equal(got_x[~pruned], want_x[~pruned]) and torch.equal(got_x[pruned], u[pruned])


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_calibration_sees_what_is_kept(method: str) -> None:
    x = torch.tensor([[1.0, -0.01, 0.02, -3.0]])
    q: Any = build(1, "ste", shape=(1, 4), range=method)
    q.calibrate(x)
    assert float(q.scale) == pytest.approx(3.0 if method == "minmax" else 2.0)


@pytest.mark.parametrize("text", ["2:2", "4:2", "0:4", "2-4", "2:4 ", ":4", "2:", "1:257", "-1:4", "2:4:8", 24, ""])
def test_text_that_is_no_pattern(text: Any) -> None:
    with pytest.raises(PlanError, match="N:M with 1 <= N < M"):
        TensorPlan(1, sparsity=text)


@pytest.mark.parametrize(
    ("quantizer", "shape", "fields", "message"),
    [
        ("lsq", (6, 10), {}, "multiple of 4, got 10 .axis 1 of shape .6, 10.*leave this layer dense"),
        ("denoise", (6, 1, 3, 3), {}, "multiple of 4, got 1 "),
        ("denoise", (6, 16), {"granularity": "block", "block": 6}, "block=6 cuts groups of 4"),
        ("bitnet", (6, 8), {}, "'bitnet' has no sparse form"),
        ("lsq", (8,), {"axis": 0, "contraction": 0}, "which has a scale for each index"),
    ],
)
def test_tensors_and_quantizers_that_cannot(
    quantizer: str, shape: tuple[int, ...], fields: dict[str, Any], message: str
) -> None:
    axes = {k: fields[k] for k in ("axis", "contraction") if k in fields}
    given = {"granularity": "channel"} | {k: v for k, v in fields.items() if k not in axes}
    with pytest.raises(PlanError, match=message):
        make_quantizer(TensorPlan(1, quantizer, sparsity="2:4", **given), shape=shape, **axes)


def test_only_symmetric_weights() -> None:
    with pytest.raises(PlanError, match="symmetric=False.*use symmetric=True"):
        TensorPlan(2, "denoise", symmetric=False, sparsity="2:4")
    for field in ("input", "operands", "output"):
        with pytest.raises(PlanError, match=f"of {field}: only weights can be sparse"):
            LayerPlan(**{field: TensorPlan(4, sparsity="2:4")})
    with pytest.raises(PlanError, match="unknown shape"):
        make_quantizer(TensorPlan(4, sparsity="2:4"), channels=8)


def test_a_block_longer_than_the_axis_may_have_any_size() -> None:
    q = build(2, "denoise", granularity="block", block=127, shape=(3, 8))
    x = torch.randn(3, 8)
    assert torch.equal(q.encode(x).decode(), q(x))
    assert "2:4 sparse" in repr(q)
