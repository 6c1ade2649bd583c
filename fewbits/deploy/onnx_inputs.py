"""Which ONNX form a quantizer of an activation has, and the forms of folded fusions and of learned thresholds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewbits.deploy.onnx_activations import EmitActivation, EmitDynamic, symbolic
from fewbits.quantizers import N2UQ, Dynamic, Quantizer, Requantize, Rethreshold


def emit_quantizer(quantizer: Quantizer, integer: bool) -> nn.Module:
    """Return what a quantizer of an activation becomes. Raises ExportError where ONNX has no form for it."""
    if isinstance(quantizer, Dynamic):
        return EmitDynamic(quantizer)
    if isinstance(quantizer, (N2UQ, Rethreshold)):
        return EmitThresholds(quantizer)
    if isinstance(quantizer, Requantize):
        return EmitRequantize(quantizer, integer)
    return EmitActivation(quantizer, integer)


class EmitRequantize(EmitActivation):
    """A folded fusion: QuantizeLinear with a scale a channel and a moved zero point, then as ``EmitActivation``.

    The codes lie in a window of 0..255 that leaves the moved zero point room; where it finds none, or ``integer`` is
    False, the arithmetic is emitted in float.
    """

    divisors: Tensor
    moved: Tensor
    bottom: Tensor
    top: Tensor
    point: Tensor

    def __init__(self, quantizer: Requantize, integer: bool) -> None:
        super().__init__(quantizer, integer)
        count = len(quantizer.divisors)
        self.register_buffer("divisors", quantizer.divisors.detach().reshape(() if count == 1 else (count,)))
        self.shift, top = int(quantizer.shift), self.grid.highest - self.grid.lowest
        zero = -int(self.low) - self.shift  # where 0 of the input lies, as an index
        base = max(0, -zero)  # of the window
        pairs = 2 * min(127, 2**14 // top) * (base + top)  # of products, as engines add them up; see ``largest_factor``
        self.integer = self.integer and zero + base <= 255 and base + top <= 255 and pairs < 2**15
        if self.integer:
            self.register_buffer("moved", torch.full_like(self.divisors, zero + base, dtype=torch.uint8))
            self.bottom.fill_(base)
            self.top.fill_(base + top)
            self.point.fill_(-int(self.low) + base)
            self.clips = base > 0 or top < 255

    def forward(self, x: Tensor) -> Tensor:
        """Return x fake-quantized, same shape, in float32."""
        if not self.integer:
            codes = torch.round(x / self._spread(self.divisors, x)) - self.shift
            return torch.clamp(codes, self.low, self.high) * self.scale
        axis = {"axis": self.grouping.axis % x.ndim} if self.divisors.ndim else {}
        q = symbolic("QuantizeLinear", [x, self.divisors, self.moved], axis, dtype=torch.uint8, shape=x.shape)
        if self.clips:
            q = symbolic("Clip", [q, self.bottom, self.top], dtype=torch.uint8, shape=x.shape)
        y: Tensor = symbolic("DequantizeLinear", [q, self.scale, self.point], dtype=torch.float32, shape=x.shape)
        return y


class EmitThresholds(nn.Module):
    """Learned thresholds, per tensor or channel: comparisons, their count as 8-bit codes, and DequantizeLinear."""

    scale: Tensor
    point: Tensor

    def __init__(self, quantizer: N2UQ | Rethreshold) -> None:
        super().__init__()
        quantizer.require_range()
        columns = quantizer.columns() if isinstance(quantizer, Rethreshold) else quantizer.thresholds().unbind()
        self.count = len(columns)
        for i, column in enumerate(columns):
            self.register_buffer(f"limit{i}", column.detach())
        self.register_buffer("scale", quantizer.affine()[0].detach().reshape(()))
        self.register_buffer("point", torch.tensor(-quantizer.grid.lowest, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Return x fake-quantized, same shape, in float32."""
        passed = [(x >= self.get_buffer(f"limit{i}")).to(torch.float32) for i in range(self.count)]
        count = passed[0]
        for one in passed[1:]:
            count = count + one
        given = [count.to(torch.uint8), self.scale, self.point]
        y: Tensor = symbolic("DequantizeLinear", given, dtype=torch.float32, shape=x.shape)
        return y
