"""The affine matmul shortcut equals the product of the decoded matrices, and its integer part is exact."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fewbits.deploy.affine import Operand, affine_matmul, integer_product, operand
from fewbits.errors import QuantizationError
from fewbits.plan import TensorPlan
from fewbits.quantizers import Codes, make_quantizer

KINDS = {
    "denoise affine": {"quantizer": "denoise", "symmetric": False},
    "denoise linear": {"quantizer": "denoise"},
    "uniform affine": {"quantizer": "ste", "symmetric": False},
    "uniform odd": {"quantizer": "ste", "options": {"odd": True}},
}


def encode(x: Tensor, bits: int, kind: str, block: int | None, weight: bool = True) -> Codes:
    granularity = "block" if block else "channel" if weight else "tensor"
    plan = TensorPlan(bits, granularity=granularity, block=block, **KINDS[kind])
    quantizer = make_quantizer(plan, shape=tuple(x.shape), axis=0, contraction=x.ndim - 1).to(x.dtype)
    quantizer.calibrate(x)
    return quantizer.encode(x)


@pytest.mark.parametrize("block", [None, 8, 32, 1000])
@pytest.mark.parametrize(("x_kind", "w_kind"), itertools.product(KINDS, KINDS))
def test_it_is_the_product_of_the_decoded_matrices(x_kind: str, w_kind: str, block: int | None) -> None:
    x, w = torch.randn(5, 3, 77, dtype=torch.float64), torch.randn(11, 77, dtype=torch.float64)
    for x_bits, w_bits in itertools.product((1, 2, 4, 8), repeat=2):
        if ("odd" in x_kind and x_bits == 8) or ("odd" in w_kind and w_bits == 8):
            continue  # odd codes reach 255 at 8 bits, past int8
        cx = encode(x, x_bits, x_kind, block or (77 if "denoise" in x_kind else None), weight=False)
        cw = encode(w, w_bits, w_kind, block)
        want = cx.decode().reshape(15, 77) @ cw.decode().T
        torch.testing.assert_close(affine_matmul(operand(cx), operand(cw)), want, rtol=0, atol=1e-13 * want.abs().max())


def test_a_row_wise_operand_meets_a_blocked_one_and_blocks_that_divide() -> None:
    x, w = torch.randn(4, 64, dtype=torch.float64), torch.randn(6, 64, dtype=torch.float64)
    for x_block, w_block in ((64, 16), (16, 64), (32, 8), (128, 24)):
        cx, cw = encode(x, 4, "denoise affine", x_block), encode(w, 1, "denoise affine", w_block)
        want = cx.decode() @ cw.decode().T
        torch.testing.assert_close(affine_matmul(operand(cx), operand(cw)), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 17, 1033, 3000])
def test_integers_are_exact_at_their_largest(length: int) -> None:
    x = torch.full((3, length), -128, dtype=torch.int8)
    w = torch.randint(-128, 128, (5, length), dtype=torch.int8)
    want = x.to(torch.int64) @ w.to(torch.int64).T
    assert torch.equal(integer_product(x, w, 128 * 128).to(torch.int64), want)


def test_float32_scales_give_float32_accuracy() -> None:
    x, w = torch.randn(7, 256), torch.randn(9, 256)
    cx, cw = encode(x, 4, "denoise affine", 128), encode(w, 1, "denoise affine", 128)
    got = affine_matmul(operand(cx), operand(cw))
    want = cx.decode().double() @ cw.decode().double().T
    assert got.dtype == torch.float32 and (got - want).abs().max() < 1e-5 * want.abs().max()


def test_what_does_not_fit_is_an_error() -> None:
    x, w = torch.randn(4, 48), torch.randn(6, 48)
    with pytest.raises(QuantizationError, match="blocks of 16 and of 12 do not fit"):
        affine_matmul(operand(encode(x, 4, "denoise affine", 16)), operand(encode(w, 4, "denoise affine", 12)))
    with pytest.raises(QuantizationError, match="cannot contract 48 values with 40"):
        short = operand(encode(w[:, :40], 4, "denoise affine", 8))
        affine_matmul(operand(encode(x, 4, "denoise affine", 8)), short)
    plan = TensorPlan(4, "ste", granularity="channel")
    quantizer = make_quantizer(plan, shape=(4, 48), axis=1)
    quantizer.calibrate(x)
    with pytest.raises(QuantizationError, match="cannot leave the product"):
        operand(quantizer.encode(x))


def test_bit_planes_give_the_same_integers() -> None:
    """A4W1 as population counts of four activation planes: the identity that bit-serial kernels rest on."""
    x, w = torch.randint(0, 16, (3, 128)), torch.randint(0, 2, (5, 128))
    planes = sum(2**j * ((x >> j & 1)[:, None] & w).sum(-1) for j in range(4))
    got = integer_product(x.to(torch.int8), w.to(torch.int8), 15)
    assert torch.equal(got.to(torch.int64), planes) and 128 * 15 < 2**15


def test_the_operand_is_a_plain_value() -> None:
    codes = encode(torch.randn(6, 40), 2, "denoise affine", 16)
    made = operand(codes)
    assert isinstance(made, Operand) and made.codes.dtype == torch.int8 and made.scale.shape == (6, 3)
    assert made.widths.tolist() == [16, 16, 8]
