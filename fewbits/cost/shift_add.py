"""A bit-true simulator of the serial shift-add MAC, and the parallel INT8 MAC beside it.

SigmaQuant (arXiv 2602.22136), section on hardware: 8-bit activation times n-bit weight by shifting and adding into a
32-bit accumulator. The weight's n-bit two's complement is sum of b_k 2^k - b_{n-1} 2^(n-1): a cycle takes the lowest
set bit k that is left, adds the activation shifted by k (subtracts it for the top bit) and clears the bit; it is the
last one when nothing is left. The accumulator wraps around. ``hardware/`` holds the same in Verilog.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.cost.cycles import code_cycles
from fewbits.errors import HardwareError

ACTIVATION_BITS = 8
ACCUMULATOR_BITS = 32


@dataclass(frozen=True)
class MacResult:
    """accumulators: int32, of the operands' shape without its last axis. cycles: int64, of the same shape."""

    accumulators: Tensor
    cycles: Tensor


def shift_add_mac(activations: Tensor, weights: Tensor, bits: int, start: int = 0) -> MacResult:
    """Run one serial MAC over the last axis [..., K] of integer tensors that broadcast against each other.

    bits: n, 1..8, of the weight codes in -2^(n-1)..2^(n-1) - 1; activations are signed 8-bit integers. start: of the
    accumulators. Raises HardwareError for what does not fit the ports.
    """
    activations, weights = _operands(activations, weights, bits)
    field = weights & (2**bits - 1)
    accumulators = torch.full(activations.shape[:-1], start, dtype=torch.int64, device=activations.device)
    for k in range(bits):
        added = (((field >> k) & 1) * (activations << k)).sum(-1)
        accumulators = accumulators - added if k == bits - 1 else accumulators + added
    return MacResult(wrap(accumulators), code_cycles(weights, bits).sum(-1))


def int8_mac(activations: Tensor, weights: Tensor, bits: int = 8, start: int = 0) -> MacResult:
    """Run one parallel MAC, one product a cycle; arguments and errors as of ``shift_add_mac``."""
    activations, weights = _operands(activations, weights, bits)
    accumulators = start + (activations * weights).sum(-1)
    return MacResult(wrap(accumulators), torch.full_like(accumulators, activations.shape[-1]))


def wrap(values: Tensor) -> Tensor:
    """Return int64 values as a 32-bit accumulator holds them: modulo 2^32, int32."""
    half: int = 2 ** (ACCUMULATOR_BITS - 1)
    return ((values + half) % (2 * half) - half).to(torch.int32)


def _operands(activations: Tensor, weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    if type(bits) is not int or not 1 <= bits <= 8:
        raise HardwareError(f"the weight port takes 1 to 8 bits, got bits={bits!r}")
    for what, values, width in (("activations", activations, ACTIVATION_BITS), ("weights", weights, bits)):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool or not values.ndim:
            raise HardwareError(f"{what} must be integers [..., K], got {values.dtype} of shape {tuple(values.shape)}")
        low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
        least, most = (int(values.min()), int(values.max())) if values.numel() else (0, 0)
        if least < low or most > high:
            raise HardwareError(f"{what} must be signed {width}-bit integers {low}..{high}, got {least}..{most}")
    try:
        first, second = torch.broadcast_tensors(activations, weights)  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise HardwareError(
            f"activations {tuple(activations.shape)} and weights {tuple(weights.shape)} must broadcast, with the "
            "products that are summed on the last axis"
        ) from None
    return first.to(torch.int64), second.to(torch.int64)
