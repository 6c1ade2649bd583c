"""The cost of affine codes in a matmul: the shortcut's corrections next to the same product with linear codes.

GEMM shapes of a 1B-parameter transformer (width 2048, MLP 8192) at M = 1, 16, 256 tokens, blocks of 128; float32 for
comparison. Arms in turn, median of the rounds. On a CPU the integer product itself runs in floats (exact): what is
measured is the overhead of the offsets, not the speed that integer kernels would give.

    python -m benchmarks.affine_matmul
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fewbits.deploy.affine import affine_matmul, operand
from fewbits.plan import TensorPlan
from fewbits.quantizers import Codes, make_quantizer

SHAPES = ((2048, 2048), (2048, 8192), (8192, 2048))  # in, out
WIDTHS = ((8, 4), (4, 4), (4, 1))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 256])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print("| bits | in x out | M | float, ms | linear, ms | affine, ms | affine / linear |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (act, bits), (length, outputs) in ((w, s) for w in WIDTHS for s in SHAPES):
        weight = torch.randn(outputs, length)
        w = operand(encode(weight, bits))
        for tokens in args.tokens:
            x = torch.randn(tokens, length)
            codes = encode(x, act)
            plain_w = replace(w, offset=None)
            times = medians(
                [
                    lambda x=x, weight=weight: x @ weight.T,
                    lambda c=codes, b=plain_w: affine_matmul(replace(operand(c), offset=None), b),
                    lambda c=codes, b=w: affine_matmul(operand(c), b),
                ],
                args.rounds,
            )
            cells = " | ".join(f"{t:.2f}" for t in times)
            print(
                f"| A{act}W{bits} | {length} x {outputs} | {tokens} | {cells} | {times[2] / times[1]:.3f} |", flush=True
            )


def encode(x: Tensor, bits: int) -> Codes:
    """Return the affine codes of the denoising quantizer in blocks of 128."""
    plan = TensorPlan(bits, "denoise", symmetric=False, granularity="block", block=128)
    return make_quantizer(plan, shape=tuple(x.shape)).encode(x)


def medians(arms: list[Callable[[], Tensor]], rounds: int) -> list[float]:
    """Return the median milliseconds of each arm, taken in turn."""
    times: list[list[float]] = [[] for _ in arms]
    for turn in range(rounds + 1):
        for arm, taken in zip(arms, times):
            start = time.perf_counter()
            arm()
            if turn:
                taken.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    main()
