"""The denoising quantizer as a quantizer: options, errors, and how well it reconstructs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.errors import PlanError, QuantizationError
from fewbits.plan import TensorPlan
from fewbits.quantizers import Quantizer, make_quantizer
from tests.quantizers.test_uniform import DTYPES, KINDS, values


def build(bits: int, shape: tuple[int, ...], block: int = 128, **fields: Any) -> Quantizer:
    """Return a denoising quantizer of blocks along axis 1; what is no field of a plan is an option."""
    options = {k: v for k, v in fields.items() if k not in ("symmetric", "sparsity", "quantizer")}
    given = {"quantizer": "denoise"} | {k: v for k, v in fields.items() if k not in options}
    return make_quantizer(TensorPlan(bits, granularity="block", block=block, options=options, **given), shape=shape)


def distributions(count: int = 2000) -> dict[str, Tensor]:
    normal = torch.randn(count, 128)
    outlier = torch.randn(count, 128)
    outlier[:, 5] = 20.0
    return {
        "Gaussian": normal,
        "Laplace": torch.distributions.Laplace(0.0, 1.0).sample((count, 128)),
        "GELU": F.gelu(torch.randn(count, 128)),
        "outlier": outlier,
    }


TABLE = {  # relative error on blocks of 128 with lam = 0.01, a column of the specification's table each
    "1 bit affine": (1, {"symmetric": False}, {"Gaussian": 0.376, "Laplace": 0.506, "GELU": 0.394, "outlier": 0.482}),
    "1 bit affine about the mean": (
        1,
        {"symmetric": False, "range": "absmean"},
        {"Gaussian": 0.361, "Laplace": 0.490, "GELU": 0.337, "outlier": 0.773},
    ),
    "1 bit sign": (1, {}, {"Gaussian": 0.365, "Laplace": 0.500, "GELU": 0.772, "outlier": 0.787}),
    "2 bit affine": (2, {"symmetric": False}, {"Gaussian": 0.197, "Laplace": 0.282, "GELU": 0.094, "outlier": 0.392}),
    "4 bit affine": (4, {"symmetric": False}, {"Gaussian": 0.010, "Laplace": 0.017, "GELU": 0.007, "outlier": 0.043}),
    "2 bit affine about the mean": (2, {"symmetric": False, "range": "absmean"}, {"Gaussian": 0.1188}),  # Max 1960,
    "3 bit affine about the mean": (3, {"symmetric": False, "range": "absmean"}, {"Gaussian": 0.0374}),  # table II
    "ternary absmax": (2, {}, {"Gaussian": 0.459, "Laplace": 0.536, "GELU": 0.494, "outlier": 0.484}),
    "ternary absmean": (
        2,
        {"range": "absmean"},
        {"Gaussian": 0.213, "Laplace": 0.315, "GELU": 0.397, "outlier": 0.721},
    ),
    "ordinary 1 bit": (
        1,
        {"quantizer": "dynamic", "symmetric": False},
        {"Gaussian": 3.63, "Laplace": 6.90, "GELU": 0.83, "outlier": 1.92},
    ),
    "ordinary 2 bit": (
        2,
        {"quantizer": "dynamic", "symmetric": False},
        {"Gaussian": 0.254, "Laplace": 0.445, "GELU": 0.127, "outlier": 1.65},
    ),
    "2:4 sign": (1, {"sparsity": "2:4"}, {"Gaussian": 0.292}),
}


@pytest.mark.parametrize("row", TABLE)
def test_reconstruction(row: str) -> None:
    bits, fields, errors = TABLE[row]
    found = distributions()
    for name, wanted in errors.items():
        x = found[name]
        y = build(bits, tuple(x.shape), **fields)(x)
        error = float((y - x).square().mean() / x.var(1, correction=0).mean())
        assert error == pytest.approx(wanted, rel=0.03, abs=0.0006), name


@pytest.mark.parametrize(("range", "zeros"), [("absmax", 0.84), ("absmean", 0.31)])
def test_two_symmetric_bits_are_ternary(range: str, zeros: float) -> None:
    x = torch.randn(1000, 128)
    codes = build(2, tuple(x.shape), range=range).encode(x).values
    assert codes.unique().tolist() == [-1, 0, 1]
    assert float((codes == 0).double().mean()) == pytest.approx(zeros, abs=0.01)


@pytest.mark.parametrize(
    ("bits", "fields", "grid"),
    [
        (1, {}, [-1, 1]),
        (1, {"symmetric": False}, [0, 1]),
        (2, {"symmetric": False}, [0, 1, 2, 3]),
        (2, {"odd": True}, [-3, -1, 1, 3]),
        (3, {}, [-3, -2, -1, 0, 1, 2, 3]),
    ],
)
def test_grids(bits: int, fields: dict[str, Any], grid: list[int]) -> None:
    x = torch.randn(50, 128)
    assert build(bits, (50, 128), **fields).encode(x).values.unique().tolist() == grid


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lam": 0.0}, "lam must be a number above 0, got 0.0"),
        ({"lam": -1}, "lam must be a number above 0, got -1"),
        ({"lam": math.nan}, "lam must be a number above 0"),
        ({"lam": "0.01"}, "lam must be a number above 0"),
        ({"gradient": "gian"}, "gradient must be one of"),
        ({"range": "minmax"}, r"range must be one of \('absmax', 'absmean'\)"),
        ({"range": "absmax", "symmetric": False}, r"range must be one of \('minmax', 'absmean'\)"),
        ({"range": "absmean"}, "absmean.*got bits=4"),
        ({"clip": "mask"}, "clip must be one of.*got clip='mask', range='absmax'"),
        ({"clip": "no"}, "clip must be one of"),
        ({"odd": True, "symmetric": False}, "symmetric=True with odd=True"),
        ({"lambda": 0.01}, "unexpected keyword"),
    ],
)
def test_options_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        build(4, (3, 128), **fields)


def test_the_range_by_the_mean_magnitude_is_for_few_bits() -> None:
    with pytest.raises(PlanError, match="up to 4 bits where affine.*got bits=5, symmetric=False"):
        build(5, (3, 128), symmetric=False, range="absmean")


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_values_that_are_not_finite_are_a_named_error(poison: float) -> None:
    x = torch.randn(3, 128)
    x[1, 2] = poison
    for verb in ("encode", "calibrate"):
        with pytest.raises(QuantizationError, match=r"1 of 384 values are NaN or Inf"):
            getattr(build(4, (3, 128)), verb)(x)


def test_a_rest_counts_its_own_elements_only() -> None:
    x = torch.randn(4, 150)
    whole = build(2, (4, 150), symmetric=False)(x)
    assert torch.equal(whole[:, :128], build(2, (4, 128), symmetric=False)(x[:, :128]))
    assert torch.equal(whole[:, 128:], build(2, (4, 22), block=22, symmetric=False)(x[:, 128:]))
    longer = build(2, (4, 150), block=1000, symmetric=False)  # a block longer than the axis is the axis
    assert torch.equal(longer(x), build(2, (4, 150), block=150, symmetric=False)(x))


def test_blocks_of_convolutions_run_along_input_channels() -> None:
    w, x = torch.randn(5, 8, 3, 3), torch.randn(2, 8, 6, 7)
    y = build(2, tuple(w.shape), block=4, symmetric=False)(w)
    alone = build(2, (1, 4), block=4, symmetric=False)(w[2, 4:, 1, 2][None])
    assert torch.equal(y[2, 4:, 1, 2], alone[0])  # per kernel tap
    plan = TensorPlan(2, "denoise", symmetric=False, granularity="block", block=4)
    activation = make_quantizer(plan, channels=8, axis=-3, contraction=-3)
    alone = build(2, (1, 4), block=4, symmetric=False)(x[1, :4, 5, 3][None])
    assert torch.equal(activation(x)[1, :4, 5, 3], alone[0])  # per sample and position
    assert torch.equal(activation(x[1]), activation(x)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_are_in_float32(dtype: torch.dtype) -> None:
    x, u = torch.randn(6, 256).to(dtype).requires_grad_(), torch.randn(6, 256).to(dtype)
    q = build(2, (6, 256), symmetric=False)
    wide = x.detach().float().requires_grad_()
    y, exact = q(x), q(wide)
    assert y.dtype == dtype and torch.equal(y, exact.to(dtype))
    (got,) = torch.autograd.grad(y, x, u)
    (wanted,) = torch.autograd.grad(exact, wide, u.float())
    assert got.dtype == dtype and torch.equal(got, wanted.to(dtype))


def test_ste_gradient_is_the_identity_on_the_same_values() -> None:
    x, u = torch.randn(3, 128, requires_grad=True), torch.randn(3, 128)
    q, ste = build(1, (3, 128), symmetric=False), build(1, (3, 128), symmetric=False, gradient="ste")
    assert torch.equal(q(x), ste(x))
    assert torch.equal(torch.autograd.grad(ste(x), x, u)[0], u)
    assert not torch.equal(torch.autograd.grad(q(x), x, u)[0], u)


@settings(max_examples=150)
@given(
    lam=st.floats(1e-38, 1e38),
    bits=st.sampled_from([1, 2, 4, 8]),
    kind=st.sampled_from([*KINDS, "one outlier"]),
    dtype=st.sampled_from(DTYPES),
    fields=st.sampled_from([{"symmetric": False}, {}, {"odd": True}, {"sparsity": "2:4"}, {"detach_range": True}]),
    seed=st.integers(0, 99),
)
def test_never_nan(lam: float, bits: int, kind: str, dtype: torch.dtype, fields: dict[str, Any], seed: int) -> None:
    x = values("constant" if kind == "one outlier" else kind, (3, 8), dtype, seed)
    if kind == "one outlier":
        x[:, 2] = torch.finfo(dtype).max / 3
    q = build(bits, (3, 8), block=8, lam=lam, **fields)
    x.requires_grad_()
    y = q(x)
    (grad,) = torch.autograd.grad(y, x, torch.randn(3, 8).to(dtype))
    assert bool(torch.isfinite(y).all()) and bool(torch.isfinite(grad).all())
    assert torch.equal(q.encode(x.detach()).decode(), y)
