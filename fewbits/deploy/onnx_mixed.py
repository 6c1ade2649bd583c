"""Weights whose output channels differ in width, as ONNX holds them: channels of one type together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fewbits.deploy.onnx_nodes import EmitWeight
from fewbits.quantizers import Codes
from fewbits.quantizers.codes import make_grid

TYPES = (2, 4, 8)  # bits of ONNX's integers


class EmitMixed(nn.Module):
    """Codes as one integer initializer for each type that the channels need, joined and put in order when it runs."""

    order: Tensor
    offset = None  # of ``maxabs``, the quantizer that mixes, there is none

    def __init__(self, codes: Codes, widths: Sequence[int], *, contraction_first: bool) -> None:
        super().__init__()
        types = torch.tensor([next(bits for bits in TYPES if width <= bits) for width in widths])
        rows = [(types == bits).nonzero().flatten() for bits in TYPES]
        parts = [
            EmitWeight(
                _channels(codes, some, max(widths[i] for i in some.tolist())),
                kind=f"INT{bits}",
                contraction_first=contraction_first,
            )
            for bits, some in zip(TYPES, rows)
            if len(some)
        ]
        self.parts = nn.ModuleList(parts)
        self.kind = "+".join(part.kind for part in parts)
        self.axis = parts[0].axis
        self.register_buffer("order", torch.cat(rows).argsort())

    def stored(self) -> dict[str, str]:
        """Return the type of each initializer."""
        return {f"parts.{i}.codes": str(part.kind) for i, part in enumerate(self.parts)}

    def product(self) -> Tensor:
        """Return the weight, [K, N] where contraction_first was asked for."""
        joined = torch.cat([part.product() for part in self.parts if isinstance(part, EmitWeight)], self.axis)
        return joined.index_select(self.axis, self.order)

    decode = product


def _channels(codes: Codes, rows: Tensor, bits: int) -> Codes:
    """Return some of the channels alone, none of them wider than ``bits``."""
    return replace(
        codes,
        values=codes.values.index_select(codes.grouping.axis, rows),
        scale=codes.scale[rows],
        grid=make_grid(bits, symmetric=True, narrow=True),
        channel_bits=None,
    )
