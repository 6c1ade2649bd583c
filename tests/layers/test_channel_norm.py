from __future__ import annotations

import pytest
import torch

from fewbits.layers import channel_norm as module
from fewbits.layers.channel_norm import channel_norm


@pytest.mark.parametrize(("shape", "axis"), [((5, 6, 3, 4), 1), ((5, 3, 6), -1), ((6, 7), 0), ((2, 3, 4, 5, 6), 2)])
@pytest.mark.parametrize("part", [1, 1 << 18])
def test_it_is_the_norm_and_its_gradient(
    shape: tuple[int, ...], axis: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART", part)
    h = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    variance, mean = torch.var_mean(h, axis, unbiased=False, keepdim=True)
    torch.testing.assert_close(channel_norm(h, axis, 1e-5), (h - mean) / (variance + 1e-5).sqrt())
    assert torch.autograd.gradcheck(lambda x: channel_norm(x, axis, 1e-5), (h,))


def test_a_place_where_all_channels_agree_is_zero_and_has_a_gradient() -> None:
    h = torch.ones(1, 4, 2, requires_grad=True)
    y = channel_norm(h, 1, 1e-5)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y)) and h.grad is not None and torch.isfinite(h.grad).all()


def test_strided_inputs_and_gradients_are_taken() -> None:
    h = torch.randn(2, 5, 5, 6).permute(0, 3, 1, 2).requires_grad_()  # channels last in memory
    plain = h.detach().contiguous().requires_grad_()
    g = torch.randn(2, 5, 5, 6).permute(0, 3, 1, 2)
    for x in (h, plain):
        channel_norm(x, 1, 1e-5).backward(g)
    assert h.grad is not None and plain.grad is not None
    torch.testing.assert_close(h.grad, plain.grad)
