"""Granularity: which elements of a tensor share one scale.

Every quantizer works on rows ``[G, m]``: the m elements of a row share a scale. A grouping turns a tensor into
rows and back. A contraction axis that no whole number of blocks fills ends in one shorter block, which is a
part of its own: ``rows`` returns it as a second, narrower matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import QuantizationError


@dataclass(frozen=True)
class Grouping:
    """granularity: tensor, channel, block or head. axis: of the channels or heads. contraction: summed axis.

    ``head`` is ``channel`` under the name that attention uses. Blocks run along the contraction axis, inside
    one output channel (and one kernel tap, for convolutions).
    """

    granularity: str = "tensor"
    axis: int = 0
    contraction: int = 1
    block: int | None = None

    def count(self, shape: Sequence[int]) -> int:
        """Return the number of rows, hence of scales, of a tensor of this shape."""
        if self.granularity == "tensor":
            return 1
        if self.block is None:
            return shape[self.axis]
        length = shape[self.contraction]
        return math.prod(shape) // max(length, 1) * -(-length // self.block)

    def rows(self, x: Tensor) -> list[Tensor]:
        """Return x as one matrix [G, m], or as two where a last partial block is left over."""
        if self.granularity == "tensor":
            return [x.reshape(1, -1)]
        if self.block is None:
            return [x.movedim(self.axis, 0).flatten(1) if x.ndim > 1 else x.reshape(-1, 1)]
        moved = x.movedim(self.contraction, -1)
        whole = moved.shape[-1] // self.block * self.block
        parts = [moved[..., :whole].reshape(-1, self.block)] if whole else []
        if whole < moved.shape[-1]:
            tail = moved[..., whole:]
            parts.append(tail.reshape(-1, tail.shape[-1]))
        return parts

    def views(self, x: Tensor) -> list[Tensor]:
        """Return ``rows`` as views [..., m] of x in the memory layout that it has; x as ``viewable`` made it."""
        if self.granularity == "tensor":
            return [x.view(1, -1)]
        if self.block is None:
            moved = x.movedim(self.axis, 0)
            return [moved.view(len(moved), -1)]
        moved = x.movedim(self.contraction, -1)
        whole = moved.shape[-1] // self.block * self.block
        parts = [moved[..., :whole].view(*moved.shape[:-1], whole // self.block, self.block)] if whole else []
        return [*parts, moved[..., None, whole:]] if whole < moved.shape[-1] else parts

    def viewable(self, x: Tensor) -> Tensor:
        """Return x, copied where its layout allows no ``views``."""
        if self.granularity == "tensor":
            return x.contiguous()
        if self.block is None:
            return x.movedim(self.axis, 0).contiguous().movedim(0, self.axis)
        return x

    def merge(self, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Undo ``rows`` for a tensor of the given shape."""
        if self.granularity == "tensor":
            return parts[0].reshape(tuple(shape))
        axis = self.axis if self.block is None else self.contraction
        moved = list(shape)
        length = moved.pop(axis)
        if self.block is None:
            return parts[0].reshape(length, *moved).movedim(0, axis)
        tail = length % self.block
        widths = [w for w in (length - tail, tail) if w]
        pieces = [part.reshape(*moved, width) for part, width in zip(parts, widths)]
        return torch.cat(pieces, dim=-1).movedim(-1, axis)

    def split(self, per_row: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        """Cut a vector with one value a row ([G]) into one column ([g, 1]) for each part."""
        sizes = [part.shape[0] for part in parts]
        if sum(sizes) != per_row.numel():
            raise QuantizationError(
                f"the tensor has {sum(sizes)} groups ({self.granularity}), the quantizer holds {per_row.numel()} "
                "scales; was it built for another shape, or is a static quantizer fed a varying one?"
            )
        return [column[:, None] for column in torch.split(per_row, sizes)]
