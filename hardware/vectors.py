"""Operands for the test bench, and what the Python simulator says of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.cost import code_cycles, multiplier_codes
from fewbits.cost.shift_add import wrap
from fewbits.plan import TensorPlan
from fewbits.quantizers import make_quantizer
from hardware.tools import Design, simulate

Operands = tuple[Tensor, Tensor, Tensor]  # clear, activation and weight of each product, int64 [K]


def all_products(bits: int) -> Operands:
    """Every signed 8-bit activation with every weight of ``bits``, each product on its own."""
    a, w = torch.meshgrid(signed(8), signed(bits), indexing="ij")
    return torch.ones(a.numel(), dtype=torch.int64), a.flatten(), w.flatten()


def random_and_extreme(bits: int, count: int, seed: int = 0) -> Operands:
    """Sums of about 16 products; a third of the operands are the least, the greatest, 0, 1 or -1."""
    random = torch.Generator().manual_seed(seed)

    def draw(width: int) -> Tensor:
        low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
        ends = torch.tensor([low, high, 0, 1, -1])[torch.randint(5, (count,), generator=random)]
        anywhere = torch.randint(low, high + 1, (count,), generator=random)
        return torch.where(torch.rand(count, generator=random) < 1 / 3, ends, anywhere)

    clear = (torch.rand(count, generator=random) < 1 / 16).long()
    clear[0] = 1
    return clear, draw(8), draw(bits)


def overflowing(bits: int) -> Operands:
    """One sum of the largest products there are, which leaves 32 bits."""
    least = -(2 ** (bits - 1))
    count = 2**31 // (128 * -least) + 16
    clear = torch.zeros(count, dtype=torch.int64)
    clear[0] = 1
    return clear, torch.full((count,), -128), torch.full((count,), least)


def of_a_layer(bits: int, count: int, activations: str, seed: int = 0) -> Operands:
    """One sum over Gaussian weights, quantized per channel of 576 by their largest (SigmaQuant's quantizer).

    activations: "relu", a rectified Gaussian cut at its 99.9th percentile, or "uniform" over all 8-bit integers.
    """
    random = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(-(-count // 576), 576, generator=random)
    plan = TensorPlan(bits, "ste", granularity="channel", range="minmax", options={"narrow": True})
    quantizer = make_quantizer(plan, shape=tuple(weight.shape))
    quantizer.calibrate(weight)
    w = multiplier_codes(quantizer.encode(weight)).flatten()[:count].long()
    if activations == "uniform":
        a = torch.randint(-128, 128, (count,), generator=random)
    else:
        x = torch.randn(count, generator=random).relu()
        a = (x / torch.quantile(x, 0.999) * 127).round().clamp(max=127).long()
    clear = torch.zeros(count, dtype=torch.int64)
    clear[0] = 1
    return clear, a, w


def signed(bits: int) -> Tensor:
    """Return all two's complement integers of a width."""
    return torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))


def as_lines(operands: Operands, bits: int) -> str:
    """Return operands as the test bench reads them."""
    columns = (operands[0], operands[1] % 256, operands[2] % 2**bits)
    return "".join(f"{c:x} {a:x} {w:x}\n" for c, a, w in zip(*(column.tolist() for column in columns)))


def expected(operands: Operands, bits: int, serial: bool) -> str:
    """Return what the test bench must write: the accumulator after each product, and its cycles."""
    clear, a, w = operands
    total = (a * w).cumsum(0)
    starts = clear.nonzero().flatten()
    before = (total - a * w)[starts]  # of each sum
    accumulators = wrap(total - before[clear.cumsum(0) - 1]).long() % 2**32
    cycles = code_cycles(w, bits) if serial else torch.ones_like(w)
    return "".join(f"{x:08x} {c}\n" for x, c in zip(accumulators.tolist(), cycles.tolist()))


def mismatches(design: Design, operands: Operands, bits: int, **how: object) -> int:
    """Return how many products a circuit gets wrong, in value or in cycles."""
    port = operands[0], operands[1], operands[2] % 2**bits if design.serial else operands[2]
    width = bits if design.serial else design.bits
    found = simulate(design, as_lines(port, width), bits, **how).splitlines()  # type: ignore[arg-type]
    wanted = expected(operands, bits, design.serial).splitlines()
    return abs(len(found) - len(wanted)) + sum(x != y for x, y in zip(found, wanted))
