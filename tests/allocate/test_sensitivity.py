"""Distortion measures against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbits
from fewbits.allocate import fisher, uniform_plan, weight_mse
from fewbits.errors import DataError, QuantizationError

MENU = (2, 4, 8)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(2, 3, 6, 6), torch.randint(0, 5, (2,))) for _ in range(count)]


def round_to(layer: nn.Module, weight: Tensor, bits: int) -> Tensor:
    """Return the error of a plain grid, written here anew."""
    step = weight.abs().max() / 2 ** (bits - 1)
    return (weight / step).round() * step - weight


def test_mse_is_the_squared_error_of_the_quantizer_that_the_plan_names() -> None:
    model = net()
    found = weight_mse(model, MENU, relative=False)
    relative = weight_mse(model, MENU)
    for column, bits in enumerate(MENU):
        quantized = fewbits.quantize(net(), uniform_plan(net(), bits, first_last=None), verbose=False)
        quantized.load_state_dict(model.state_dict(), strict=False)
        for name in ("0", "4"):
            weight = model.get_submodule(name).weight.detach()
            layer: Any = quantized.get_submodule(name)
            layer.weight_quantizer.calibrate(weight)
            error = float((layer.weight_quantizer(weight) - weight).detach().double().square().sum())
            assert found[name][column] == pytest.approx(error, rel=1e-5)
            assert relative[name][column] == pytest.approx(error / float(weight.double().square().sum()), rel=1e-5)


def test_more_bits_less_error() -> None:
    for errors in weight_mse(net(), MENU).values():
        assert errors[0] > 5 * errors[1] > 25 * errors[2] > 0


def test_a_sample_of_channels_stands_for_all() -> None:
    model = nn.Sequential(nn.Linear(64, 512), nn.ConvTranspose2d(64, 256, 2))
    whole, sampled = weight_mse(model, (3,), relative=False), weight_mse(model, (3,), relative=False, sample=1 << 12)
    for name in whole:
        assert sampled[name][0] != whole[name][0]
        assert sampled[name][0] == pytest.approx(whole[name][0], rel=0.1)


def test_fisher_is_squared_gradient_times_squared_error() -> None:
    model, data = net().eval(), batches()
    found = fisher(model, data, loss, MENU, quantize_error=round_to)
    weight = model[4].weight
    squares = []
    for batch in data:
        model.zero_grad()
        loss(model, batch).backward()
        squares.append(weight.grad.square().clone())
    mean = torch.stack(squares).mean(0)
    for column, bits in enumerate(MENU):
        expected = (mean * round_to(model[4], weight.detach(), bits).square()).sum() / 2
        assert found["4"][column] == pytest.approx(float(expected), rel=1e-4)


def test_fisher_leaves_the_model_as_it_was() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = fisher(model, batches(), loss, MENU)
    assert found["0"][0] > 0  # frozen weights are judged too
    assert not model[0].weight.requires_grad and model[4].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in model] == [True, False, True, True, True]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_layer_that_the_loss_does_not_reach_has_no_sensitivity() -> None:
    model = net()
    model.add_module("aside", nn.Linear(2, 2))
    model.forward = lambda x: model[4](model[3](model[0](x)))  # type: ignore[method-assign]
    assert fisher(model, batches(), loss, (2,))["aside"] == [0.0]


def test_bad_input() -> None:
    model = net()
    with pytest.raises(DataError, match="at least one batch"):
        fisher(model, [], loss, MENU)
    with pytest.raises(DataError, match="loss of batch 1 is nan"):
        fisher(model, [(torch.full((1, 3, 6, 6), torch.nan), torch.tensor([0]))], loss, MENU)
    with torch.no_grad():
        model[4].weight[0, 0] = torch.inf
    with pytest.raises(QuantizationError, match="weight of layer '4': 1 of"):
        weight_mse(model, MENU)
    with pytest.raises(QuantizationError, match="no quantizable layer"):
        weight_mse(nn.ReLU(), MENU)
