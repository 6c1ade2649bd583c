"""N:M sparsity: which weights are pruned, as an error that comes before that of the quantizer.

Of every M consecutive weights along the contraction axis the N largest by magnitude stay; the rest becomes exactly 0.
The choice is made anew from the master weights at every call, and the gradient is dense: pruned weights go on learning
and may return (the error "threshold(x) - x" is a constant of the graph, as rounding is).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.plan import Sparsity


def find_pruned(x: Tensor, pattern: Sparsity, axis: int) -> Tensor:
    """Return where x is pruned, bool of its shape. Ties keep the lower index. M must divide the size of ``axis``.

    Each value counts those of its group that go before it; all pairs at one distance are compared at once, which takes
    a fraction of the time of sorting.
    """
    moved = x.movedim(axis, -1)
    size = torch.stack(moved.reshape(-1, pattern.of).unbind(1)).abs_()  # [M, groups]; faster than T.contiguous()
    before = torch.zeros(size.shape, dtype=torch.uint8, device=x.device)  # M - 1 <= 255
    for distance in range(1, pattern.of):
        first = size[:-distance] >= size[distance:]
        before[distance:] += first.view(torch.uint8)
        before[:-distance] += first.logical_not().view(torch.uint8)
    return torch.stack((before >= pattern.kept).unbind(0), dim=1).reshape(moved.shape).movedim(-1, axis)


def prune(x: Tensor, pruned: Tensor | None) -> Tensor:
    """Return finite x with 0 where pruned; a product is several times faster than filling."""
    return x if pruned is None else x * pruned.logical_not()


def kept_values(rows: Tensor, pruned: Tensor) -> Tensor:
    """Return what is not pruned of rows [G, m], as [G, m * N / M]; each row holds whole groups."""
    return rows[~pruned].reshape(len(rows), -1)
