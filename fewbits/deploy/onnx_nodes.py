"""What packed layers become in ONNX: modules that emit integer weights with DequantizeLinear.

The exporter puts these in the place of quantizers and packed weights on a copy of the model; everything else is
exported as PyTorch does it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.deploy.align import largest_factor
from fewbits.deploy.packed import PackedLayer, packed_class
from fewbits.errors import ExportError
from fewbits.quantizers import Codes, Grid, Grouping, Uniform

symbolic: Any = torch.onnx.ops.symbolic


class EmitWeight(nn.Module):
    """Codes of a weight as an integer initializer and one DequantizeLinear, and the offset that is added to it.

    kind: "INT8", "INT4" or "INT2", the type that ``narrow`` gives the initializer afterwards (it is emitted as int8).
    offset: None for most; else the shape of scale. DequantizeLinear knows integer zero points only. Raises ExportError
    for sparse weights on the odd grid of 8 bits: with the 0 of what is pruned they have more values than a byte.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None

    def __init__(self, codes: Codes, *, kind: str, contraction_first: bool) -> None:
        super().__init__()
        self.odd = codes.grid.step == 2 and codes.grouping.block is None and _too_wide(codes, kind)
        codes = _halved(codes) if self.odd else _signed(codes, kind)
        if codes.grid.lowest < -128:
            raise ExportError(
                f"sparse odd codes of {codes.grid.lowest}..{codes.grid.highest} and 0 fit no weight type of ONNX: use "
                "at most 7 bits, odd=False, or no sparsity"
            )
        values, scale, zero = codes.values, _scale_tensor(codes, codes.scale), codes.zero_point
        point = None if zero is None else _scale_tensor(codes, zero)
        offset = None if codes.offset is None else _scale_tensor(codes, codes.offset)
        if kind == "INT8" and zero is None and codes.grid.highest >= -codes.grid.lowest - (codes.bits < 8):
            values, scale = _positive(codes, values, scale)
        axis, block = codes.grouping.axis, codes.grouping.block
        if block is not None:
            axis = codes.grouping.contraction
        if contraction_first and codes.grouping.contraction == 1:
            values, axis = values.T, 1 - axis
            scale = scale.T if scale.ndim == 2 else scale
            point, offset = (t.T if t is not None and t.ndim == 2 else t for t in (point, offset))
        kind_of_codes = torch.int8 if codes.grid.lowest < 0 else torch.uint8
        self.kind = kind if codes.grid.lowest < 0 else "U" + kind
        self.axis, self.block = axis, block
        self.attributes: dict[str, Any] = {"axis": axis} if scale.ndim else {}
        if block is not None:
            self.attributes["block_size"] = block
        self.register_buffer("codes", values.contiguous().to(kind_of_codes))
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("point", None if point is None else point.contiguous().to(kind_of_codes))
        self.register_buffer("offset", None if offset is None else offset.contiguous())

    def stored(self) -> dict[str, str]:
        """Return the type of each initializer."""
        return {"codes": self.kind}

    def product(self) -> Tensor:
        """Return the weight but for its offset, [K, N] where contraction_first was asked for."""
        shape = self.codes.shape
        if self.odd:  # (2 q + 1) * scale: shorter than an offset a channel, and rounded once
            two = torch.tensor(2.0)
            y: Tensor = symbolic("DequantizeLinear", [self.codes, two], dtype=torch.float32, shape=shape)
            return (y + 1.0) * self._spread(self.scale)
        inputs = [self.codes, self.scale] + ([] if self.point is None else [self.point])
        y = symbolic("DequantizeLinear", inputs, self.attributes, dtype=torch.float32, shape=shape)
        return y

    def _spread(self, value: Tensor) -> Tensor:
        """Shape one value a channel so that it broadcasts over the weight."""
        return value.reshape([-1 if i == self.axis else 1 for i in range(self.codes.ndim)]) if value.ndim else value

    def decode(self) -> Tensor:
        """Return the weight, [K, N] where contraction_first was asked for."""
        if self.offset is None:
            return self.product()
        offset = self.offset
        if self.block is not None:
            offset = offset.repeat_interleave(self.block, self.axis).narrow(self.axis, 0, self.codes.shape[self.axis])
        else:
            offset = self._spread(offset)
        return self.product() + offset


class EmitLayer(PackedLayer):
    """A packed linear layer as MatMul on [K, N] weights, the form that engines turn into integer products.

    An offset b of the weight stays out of the product: x (W + 1 b) = x W + sum(x) b, with the sums and offsets of each
    block where there are blocks ("Robust Training of Neural Networks at Arbitrary Precision and Sparsity", section on
    affine products).
    """

    def run(self, x: Tensor, op: Any) -> Tensor:
        """Return x W + b."""
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        weight: Any = self.packed
        y = torch.matmul(x, weight.product())
        if weight.offset is not None:
            y = y + self.correction(x, weight)
        return self.finish(y if self.bias is None else y + self.bias)

    def correction(self, x: Tensor, weight: EmitWeight) -> Tensor:
        """Return what the offset of the weight adds."""
        assert weight.offset is not None
        if weight.block is None:
            return x.sum(-1, keepdim=True) * weight.offset
        length, blocks = x.shape[-1], weight.offset.shape[0]
        padded = torch.nn.functional.pad(x, (0, blocks * weight.block - length))
        return torch.matmul(padded.reshape(*x.shape[:-1], blocks, weight.block).sum(-1), weight.offset)


def _too_wide(codes: Codes, kind: str) -> bool:
    """Tell whether odd codes must be halved to fit the type."""
    return codes.grid.highest >= 2 ** (int(kind[3:]) - 1) and codes.sparsity is None


def _halved(codes: Codes) -> Codes:
    """Return q of odd codes 2 q + 1, with the scale as it is."""
    grid = codes.grid
    half = Grid(grid.bits, (grid.lowest - 1) // 2, (grid.highest - 1) // 2)
    return replace(codes, values=(codes.values - 1) // 2, grid=half)


def _signed(codes: Codes, kind: str) -> Codes:
    """Return the same weight in codes that the type can hold, with an offset where that takes one.

    Odd codes {-3, -1, 1, 3} become 2 q + 1, and unsigned ones with an offset become signed, which engines run faster.
    """
    grid, offset = codes.grid, codes.offset
    if grid.step == 2 and _too_wide(codes, kind):
        return replace(_halved(codes), scale=codes.scale * 2, offset=codes.scale)
    if offset is not None and grid.lowest >= 0:
        shift = 2 ** (grid.bits - 1)
        moved = replace(grid, lowest=grid.lowest - shift, highest=grid.highest - shift)
        return replace(codes, values=codes.values - shift, offset=offset + shift * codes.scale, grid=moved)
    return codes


def emit_layer(layer: PackedLayer) -> None:
    """Give a packed linear layer its ONNX form, in place."""
    base = packed_class(layer.float_class)
    layer.__class__ = type(f"Emit{base.__name__}", (EmitLayer, base), {"float_class": layer.float_class})


def refine_for_bias(codes: Codes, bias: Tensor, activation: Uniform) -> Codes:
    """Return the same weight in larger codes, so that engines round its bias finely.

    Engines hold the bias of an integer convolution in int32 units of input scale x weight scale. With few bits these
    units are coarse: half of one can move the next layer's code. Codes times k with scale / k are the same weight in
    finer units; for each channel we take the k (codes stay within int8) that leaves the least rounding of the bias:
    the largest one, whose unit ``align_biases`` has used, leaves none.
    """
    largest, axis, channels = largest_factor(codes, activation), codes.grouping.axis, len(bias)
    if largest is None or len(largest) != channels:
        return codes
    scale = codes.scale.expand(channels)
    k = torch.arange(127, 0, -1)[:, None]
    unit = activation.affine()[0].double() * scale.double().abs().clamp(min=1e-30) / k
    error = ((bias.double() / unit).round() * unit - bias.double()).abs().masked_fill(k > largest, torch.inf)
    best = k[error.argmin(0), 0]
    shape = [-1 if i == axis else 1 for i in range(codes.values.ndim)]
    grouping = Grouping("channel", axis, codes.grouping.contraction)
    return replace(codes, values=codes.values * best.reshape(shape).int(), scale=scale / best, grouping=grouping)


def _scale_tensor(codes: Codes, per_row: Tensor) -> Tensor:
    """Return one value a row as ONNX wants it: a scalar, a vector, or the weight's shape with blocks as one entry."""
    grouping = codes.grouping
    if grouping.granularity == "tensor":
        return per_row.reshape(())
    if grouping.block is None:
        return per_row
    lead = list(codes.values.shape)
    length = lead.pop(grouping.contraction)
    whole = length // grouping.block
    count = per_row.numel() // -(-length // grouping.block)
    parts = [per_row[: count * whole].reshape(*lead, whole), per_row[count * whole :].reshape(*lead, -1)]
    return torch.cat([p for p in parts if p.numel()], dim=-1).movedim(-1, grouping.contraction)


def _positive(codes: Codes, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Move the signs of negative scales (folded batch norms have some) into the codes."""
    sign = torch.where(scale < 0, -1, 1).to(values.dtype)
    if scale.ndim == 1:
        shape = [1] * values.ndim
        shape[codes.grouping.axis] = -1
        return values * sign.reshape(shape), scale.abs()
    if scale.ndim == 0:
        return values * sign, scale.abs()
    axis, block = codes.grouping.contraction, codes.grouping.block
    spread = sign if block is None else sign.repeat_interleave(block, axis)
    return values * spread.narrow(axis, 0, values.shape[axis]), scale.abs()
