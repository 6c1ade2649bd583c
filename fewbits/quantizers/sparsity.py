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
    """Return where x is pruned, bool of its shape. Ties keep the lower index. M must divide the size of ``axis``."""
    moved = x.movedim(axis, -1)
    groups = moved.reshape(*moved.shape[:-1], moved.shape[-1] // pattern.of, pattern.of)
    order = torch.sort(groups.abs(), dim=-1, descending=True, stable=True).indices
    pruned = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, order[..., : pattern.kept], False)
    return pruned.flatten(-2).movedim(-1, axis)


def kept_values(rows: Tensor, pruned: Tensor) -> Tensor:
    """Return what is not pruned of rows [G, m], as [G, m * N / M]; each row holds whole groups."""
    return rows[~pruned].reshape(len(rows), -1)
