"""The simulated MACs against integer arithmetic; cycles against the popcount of the weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbits.cost import code_cycles, int8_mac, multiplier_codes, shift_add_mac, weight_cycles
from fewbits.cost.shift_add import wrap
from fewbits.errors import HardwareError
from fewbits.plan import TensorPlan
from fewbits.quantizers import make_quantizer

WIDTHS = (2, 4, 6, 8)
RANGES = {2: (1.01, 1.13), 4: (1.7, 2.1), 6: (2.9, 3.1), 8: (4.0, 4.1)}  # mean cycles on bell-shaped weights


def signed(bits: int) -> Tensor:
    return torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_product_is_the_integer_product_in_popcount_cycles(bits: int) -> None:
    activations, weights = torch.meshgrid(signed(8), signed(bits), indexing="ij")
    found = shift_add_mac(activations[..., None], weights[..., None], bits)
    assert torch.equal(found.accumulators, (activations * weights).int())
    expected = [max(1, bin(int(w) % 2**bits).count("1")) for w in signed(bits)]
    assert found.cycles.tolist() == [expected] * 256
    parallel = int8_mac(activations[..., None], weights[..., None], bits)
    assert torch.equal(parallel.accumulators, found.accumulators) and bool((parallel.cycles == 1).all())


def test_a_matrix_product_by_broadcasting() -> None:
    inputs, weights = torch.randint(-128, 128, (5, 1, 33)), torch.randint(-8, 8, (1, 7, 33))
    found = shift_add_mac(inputs, weights, 4)
    assert torch.equal(found.accumulators.long(), inputs[:, 0] @ weights[0].T)
    assert torch.equal(found.cycles, code_cycles(weights, 4).sum(-1).expand(5, 7))


@pytest.mark.parametrize("mac", [shift_add_mac, int8_mac])
def test_the_accumulator_wraps_around(mac: type) -> None:
    activations, weights = torch.tensor([127, 127]), torch.tensor([127, 127])
    start = 2**31 - 1 - 127 * 127
    found = mac(activations, weights, 8, start)
    assert found.accumulators == 127 * 127 - 1 - 2**31
    least = mac(torch.tensor([-128]), torch.tensor([127]), 8, -(2**31))
    assert least.accumulators == 2**31 - 128 * 127
    assert wrap(torch.tensor([2**31, -(2**31) - 1, 2**32])).tolist() == [-(2**31), 2**31 - 1, 0]


@pytest.mark.parametrize(
    ("activations", "weights", "bits", "message"),
    [
        (torch.tensor([128]), torch.tensor([1]), 4, "activations must be signed 8-bit integers -128..127, got 128"),
        (torch.tensor([1]), torch.tensor([2]), 2, "weights must be signed 2-bit integers -2..1, got 2"),
        (torch.tensor([1.0]), torch.tensor([1]), 2, "activations must be integers .*float32"),
        (torch.tensor([1]), torch.tensor([True]), 2, "weights must be integers .*bool"),
        (torch.tensor(1), torch.tensor(1), 2, "of shape"),
        (torch.tensor([1, 2, 3]), torch.tensor([1, 0]), 2, r"\(3,\) and weights \(2,\) must broadcast"),
        (torch.tensor([1]), torch.tensor([1]), 9, "1 to 8 bits, got bits=9"),
    ],
)
def test_what_does_not_fit_the_ports_is_an_error(activations: Tensor, weights: Tensor, bits: int, message: str) -> None:
    for mac in (shift_add_mac, int8_mac):
        with pytest.raises(HardwareError, match=message):
            mac(activations, weights, bits)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
def test_mean_cycles_of_bell_shaped_weights(distribution: str, bits: int) -> None:
    layer = torch.nn.Linear(576, 64)
    drawn = torch.randn(64, 576) if distribution == "gaussian" else torch.distributions.Laplace(0, 1).sample((64, 576))
    layer.weight.data = drawn * 0.05
    absmax = {"quantizer": "ste", "granularity": "channel", "range": "minmax", "options": {"narrow": True}}
    mean = weight_cycles(torch.nn.Sequential(layer), lambda b: TensorPlan(b, **absmax), [bits])["0"][bits]
    low, high = RANGES[bits]
    assert low - 0.05 <= mean <= high + 0.05  # the ranges have one digit


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("asked", [{"options": {"odd": True}}, {"symmetric": False}])
def test_odd_and_affine_codes_go_in_as_signed_ones(bits: int, asked: dict) -> None:
    weight = torch.randn(4, 256)
    quantizer = make_quantizer(TensorPlan(bits, "ste", **asked), shape=(4, 256))
    quantizer.calibrate(weight)
    codes = quantizer.encode(weight)
    taken = multiplier_codes(codes)
    assert set(taken.unique().tolist()) == set(signed(bits).tolist())
    inputs = torch.randint(-128, 128, (256,))
    odd = codes.grid.step == 2
    scale, shift = (2, 1) if odd else (1, 2 ** (bits - 1))
    products = scale * shift_add_mac(inputs, taken, bits).accumulators + shift * inputs.sum()
    assert torch.equal(products, (codes.values * inputs).sum(-1))
