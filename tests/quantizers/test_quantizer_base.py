"""The registry, building from a plan, and what a checkpoint of a quantizer means."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from fewbits.errors import PlanError
from fewbits.plan import TensorPlan
from fewbits.quantizers import QUANTIZERS, Quantizer, make_quantizer, register_quantizer


def test_a_quantizer_is_known_by_its_name_and_a_name_is_taken_once() -> None:
    @register_quantizer("test only")
    class Doubling(Quantizer):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    try:
        assert make_quantizer(TensorPlan(4, "test only"))(torch.ones(1)).tolist() == [2.0]
        register_quantizer("test only")(Doubling)  # the same again is no conflict
        with pytest.raises(PlanError, match="'test only' is registered already: Doubling"):
            register_quantizer("test only")(type("Other", (Quantizer,), {}))
    finally:
        del QUANTIZERS["test only"]


@pytest.mark.parametrize(
    ("granularity", "block", "shape", "groups"),
    [
        ("tensor", None, (6, 4), 1),
        ("channel", None, (6, 4), 6),
        ("head", None, (6, 4), 6),
        ("block", 3, (6, 4), 12),
        ("block", 4, (6, 4), 6),
        ("block", 2, (6, 4, 3, 3), 6 * 2 * 9),
    ],
)
def test_a_weight_quantizer_has_a_scale_for_each_group(
    granularity: str, block: int | None, shape: tuple[int, ...], groups: int
) -> None:
    quantizer = make_quantizer(TensorPlan(4, granularity=granularity, block=block), shape=shape)
    assert quantizer.groups == groups and quantizer.scale.shape == (groups,)


def test_blocks_of_an_activation_need_a_dynamic_quantizer() -> None:
    with pytest.raises(PlanError, match="'lsq' is static"):
        make_quantizer(TensorPlan(4, granularity="block", block=8), channels=16)
    assert make_quantizer(TensorPlan(4, granularity="channel"), channels=16).groups == 16
    assert make_quantizer(TensorPlan(4), channels=16).groups == 1


def test_a_float_checkpoint_loads_strictly_and_takes_the_range_away() -> None:
    model = nn.Sequential(nn.Linear(2, 2), make_quantizer(TensorPlan(4)))
    model[1].calibrate(torch.randn(2, 2))
    floats = {k: v for k, v in model.state_dict().items() if k.startswith("0.")}
    model.load_state_dict(floats, strict=True)
    assert model[1].calibrated == 0


def test_half_a_quantizer_in_a_checkpoint_is_an_error() -> None:
    quantizer = make_quantizer(TensorPlan(4, symmetric=False))
    state = quantizer.state_dict()
    del state["zero_point"]
    with pytest.raises(RuntimeError, match="zero_point"):
        quantizer.load_state_dict(state, strict=True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_copies_are_equal_and_apart(copied: object) -> None:
    quantizer = make_quantizer(TensorPlan(3, "lsq+", symmetric=False, granularity="channel"), shape=(3, 8))
    x = torch.randn(3, 8)
    quantizer.calibrate(x)
    other = copied(quantizer)  # type: ignore[operator]
    assert torch.equal(other(x), quantizer(x)) and other.plan == quantizer.plan
    with torch.no_grad():
        other.scale.mul_(2)
    assert not torch.equal(other(x), quantizer(x))


def test_print_shows_bits_symmetry_and_granularity() -> None:
    assert "4 bit, symmetric, per block 8" in repr(
        make_quantizer(TensorPlan(4, granularity="block", block=8), shape=(4, 16))
    )
    assert "2 bit, affine, per tensor" in repr(make_quantizer(TensorPlan(2, symmetric=False)))
