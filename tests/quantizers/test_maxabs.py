from __future__ import annotations

import pytest
import torch

from fewbits.errors import PlanError, QuantizationError
from fewbits.plan import TensorPlan
from fewbits.quantizers import MaxAbs, make_quantizer

ROW = [0.8, -0.5, 0.3, -0.1, 0.05, 0.0]


def quantizer(bits: int | tuple[int, ...], shape: tuple[int, ...], **options: object) -> MaxAbs:
    widths = bits if isinstance(bits, tuple) else None
    plan = TensorPlan(max(bits) if isinstance(bits, tuple) else bits, "maxabs", granularity="channel",
                      channel_bits=widths, **options)  # type: ignore[arg-type] # fmt: skip
    made = make_quantizer(plan, shape=shape)
    assert isinstance(made, MaxAbs)
    return made


@pytest.mark.parametrize(
    ("bits", "golden"),
    [
        (2, [0.8, -0.8, 0, 0, 0, 0]),
        (3, [0.8, -0.53333, 0.26667, 0, 0, 0]),
        (4, [0.8, -0.45714, 0.34286, -0.11429, 0, 0]),
        (8, [0.8, -0.49764, 0.30236, -0.10079, 0.05039, 0]),
    ],
)
def test_golden_row(bits: int, golden: list[float]) -> None:
    x = torch.tensor([ROW], requires_grad=True)
    y = quantizer(bits, (1, 6))(x)
    assert y[0].tolist() == pytest.approx(golden, abs=1e-5)
    weight = torch.randn(1, 6)
    (y * weight).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weight), "straight through: nothing is clipped"


def test_each_channel_has_its_own_width() -> None:
    x = torch.randn(3, 5, 2, 2)
    mixed = quantizer((2, 8, 4), (3, 5, 2, 2))
    alone = torch.cat([quantizer(b, (1, 5, 2, 2))(x[i : i + 1]) for i, b in enumerate((2, 8, 4))])
    assert torch.equal(mixed(x), alone)
    codes = mixed.encode(x)
    assert torch.equal(codes.decode(), mixed(x)) and codes.channel_bits == (2, 8, 4)
    assert [int(codes.values[i].abs().max()) for i in range(3)] == [1, 127, 7]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_decode_to_what_was_forwarded(dtype: torch.dtype) -> None:
    x, made = torch.randn(4, 9).to(dtype), quantizer((2, 3, 5, 8), (4, 9))
    assert made(x).dtype == dtype and torch.equal(made.encode(x).decode(), made(x))


def test_zeros_stay_zeros_and_nan_is_refused() -> None:
    made = quantizer(4, (2, 3))
    assert torch.equal(made(torch.zeros(2, 3)), torch.zeros(2, 3))
    with pytest.raises(QuantizationError, match="NaN or Inf"):
        made.encode(torch.tensor([[1.0, torch.nan, 0], [0, 0, 0]]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channel_bits": (2, 4)}, r"bits=8 with channel_bits up to 4"),
        ({"channel_bits": (1, 8)}, r"holds a width of"),
        ({"channel_bits": ()}, r"holds a width of"),
        ({"channel_bits": (2, 8), "granularity": "tensor"}, "needs granularity='channel'"),
        ({"channel_bits": (2, 8), "sparsity": "2:4"}, "no sparsity"),
    ],
)
def test_plans_that_cannot_be_are_told(changes: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        TensorPlan(**{"bits": 8, "quantizer": "maxabs", "granularity": "channel", **changes})  # type: ignore[arg-type]


def test_other_quantizers_and_other_shapes_are_refused() -> None:
    plan = TensorPlan(8, "lsq", granularity="channel", channel_bits=(2, 8))
    with pytest.raises(PlanError, match=r"'lsq' has one width.*'maxabs'"):
        make_quantizer(plan, shape=(2, 4))
    with pytest.raises(PlanError, match="channel_bits has 2 widths, the tensor 3 channels"):
        quantizer((2, 8), (3, 4))
    with pytest.raises(PlanError, match="2 to 8 bits"):
        make_quantizer(TensorPlan(1, "maxabs"), shape=(2, 4))
