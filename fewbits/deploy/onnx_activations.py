"""What quantizers of activations become in ONNX: QuantizeLinear and DequantizeLinear, or plain float operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import ExportError
from fewbits.quantizers import Dynamic, Quantizer, Uniform
from fewbits.quantizers.dynamic import wide

symbolic: Any = torch.onnx.ops.symbolic


class EmitActivation(nn.Module):
    """A static activation quantizer as QuantizeLinear (unsigned 8 bit), Clip for fewer bits, DequantizeLinear.

    Codes are emitted as indices 0..2**bits - 1, since x86 runs unsigned activations fast. Where ``integer`` is
    False, or the grid has no such form (16 bit, odd, per channel), the same arithmetic is emitted in float.
    """

    scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, quantizer: Quantizer, integer: bool) -> None:
        super().__init__()
        if not isinstance(quantizer, Uniform):
            raise ExportError(f"quantizer {quantizer.plan.quantizer!r} has no ONNX form for activations")
        quantizer.require_range()
        scale, zero = quantizer.affine()
        self.grid, self.grouping = quantizer.grid, quantizer.grouping
        self.integer = integer and quantizer.groups == 1 and self.grid.step == 1 and self.grid.bits <= 8
        shape = () if quantizer.groups == 1 else (-1,)
        zero = torch.zeros_like(scale) if zero is None else zero
        self.register_buffer("scale", scale.detach().reshape(shape))
        self.register_buffer("low", (self.grid.lowest - zero).detach().reshape(shape))
        self.register_buffer("high", (self.grid.highest - zero).detach().reshape(shape))
        self.register_buffer("point", (-self.low).clamp(0, 255).to(torch.uint8))
        top = self.grid.highest - self.grid.lowest
        self.register_buffer("top", torch.tensor(top if top < 256 else 0, dtype=torch.uint8))
        self.register_buffer("bottom", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Return x fake-quantized, same shape, in float32."""
        if not self.integer:
            return self._float(x)
        q = symbolic("QuantizeLinear", [x, self.scale, self.point], dtype=torch.uint8, shape=x.shape)
        if self.grid.bits < 8 or self.grid.highest - self.grid.lowest < 255:
            q = symbolic("Clip", [q, self.bottom, self.top], dtype=torch.uint8, shape=x.shape)
        y: Tensor = symbolic("DequantizeLinear", [q, self.scale, self.point], dtype=torch.float32, shape=x.shape)
        return y

    def _float(self, x: Tensor) -> Tensor:
        scale, low, high = (self._spread(t, x) for t in (self.scale, self.low, self.high))
        centered = x / scale
        if self.grid.step == 2:  # odd codes only
            centered = torch.round((centered - 1.0) * 0.5) * 2.0 + 1.0
        else:
            centered = torch.round(centered)
        return torch.clamp(centered, low, high) * scale

    def _spread(self, value: Tensor, x: Tensor) -> Tensor:
        """Shape one value a channel so that it broadcasts over x."""
        if value.ndim == 0:
            return value
        shape = [1] * x.ndim
        shape[self.grouping.axis] = -1
        return value.reshape(shape)


class EmitDynamic(nn.Module):
    """A dynamic activation quantizer as the float operators that it consists of: no engine has them as one."""

    def __init__(self, quantizer: Dynamic) -> None:
        super().__init__()
        self.rule, self.grouping = quantizer.rule, quantizer.grouping

    def forward(self, x: Tensor) -> Tensor:
        """Return x fake-quantized, same shape and dtype."""
        parts = []
        for rows in self.grouping.rows(wide(x)):
            values, scale, offset = self.rule.fit(rows, None)
            parts.append(values * scale if offset is None else values * scale + offset)
        return self.grouping.merge(parts, x.shape).to(x.dtype)
