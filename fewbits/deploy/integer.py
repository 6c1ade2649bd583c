"""Integer execution: packed layers that multiply codes, by the affine shortcut, instead of decoded weights.

A packed layer by default runs the very float operation that was trained, bit for bit. Here the same layer multiplies
integers, as an engine does, and is equal to it but for float rounding. A convolution is a sum of 1x1 convolutions, one
for each kernel tap, so its blocks lie along the input channels of a tap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.deploy.affine import Operand, affine_matmul, operand
from fewbits.deploy.packed import PackedLayer, packed_class
from fewbits.errors import QuantizationError
from fewbits.layers import quantized_layers
from fewbits.layers.twins import ConvTwin
from fewbits.quantizers import Codes, Grouping


class IntegerLayer(PackedLayer):
    """A packed linear layer or convolution whose product is one of integers."""

    taps: list[Operand]

    def run(self, x: Tensor, op: Any) -> Tensor:
        """Return the product of the codes of x and of the weight, plus the bias."""
        layer: Any = self
        codes = layer.input_quantizer.encode(x)
        y = _linear(codes, self.taps[0]) if layer.is_linear else _convolve(codes, self.taps, layer)
        if layer.bias is not None:
            y = y + (layer.bias if layer.is_linear else layer.bias.reshape(-1, *[1] * len(layer.kernel_size)))
        return self.finish(y)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Take the operands along where the layer goes, as to another device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.taps = _operands(self)
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self.float_class,), self.__dict__


def run_in_integers(packed: nn.Module) -> list[str]:
    """Let the linear layers and convolutions of a packed model multiply integers, in place; return their names.

    Those without an input of at most 8 bits, quantized per tensor or in blocks, or with a padding that is not zeros,
    stay as they are. The model keeps the weights once more as int8, for speed. Raises QuantizationError if nothing is
    packed.
    """
    layers = {n: layer for n, layer in quantized_layers(packed).items() if isinstance(layer, PackedLayer)}
    if not layers:
        raise QuantizationError("run_in_integers takes a packed model: call fewbits.pack(model) first")
    fitting = [name for name, layer in layers.items() if _fits(layer)]
    for name in fitting:
        layer: Any = layers[name]
        layer.taps = _operands(layer)
        layer.__class__ = _integer_class(layer.float_class)
    return fitting


def _fits(layer: Any) -> bool:
    quantizer = layer.input_quantizer
    if quantizer is None or quantizer.bits > 8 or quantizer.plan.granularity in ("channel", "head"):
        return False
    return layer.is_linear or (isinstance(layer, ConvTwin) and layer.padding_mode == "zeros")


def _integer_class(float_class: type[nn.Module]) -> type[IntegerLayer]:
    base = packed_class(float_class)
    return type(f"Integer{float_class.__name__}", (IntegerLayer, base), {"float_class": float_class})


def _rebuild(float_class: type[nn.Module]) -> IntegerLayer:
    cls = _integer_class(float_class)
    return cls.__new__(cls)


def _operands(layer: Any) -> list[Operand]:
    """Return what the input of a packed layer is multiplied with."""
    codes = layer.packed.get()
    return [_linear_weight(codes)] if layer.is_linear else list(_taps(codes, layer.groups))


def _linear_weight(codes: Codes) -> Operand:
    """Return a linear weight, [out, in] or GPT-2's [in, out], as an operand with a row an output."""
    if codes.grouping.contraction == 1:
        return operand(codes)
    grouping = replace(codes.grouping, axis=0, contraction=1)
    return operand(replace(codes, values=codes.values.T, grouping=grouping))


def _linear(codes: Codes, weight: Operand) -> Tensor:
    product = affine_matmul(operand(codes), weight)
    return product.reshape(*codes.values.shape[:-1], product.shape[1]).to(codes.dtype)


def _taps(codes: Codes, groups: int) -> Iterator[Operand]:
    """Yield the weight [out, in / groups, ...] of a convolution group by group and, within, tap by tap."""
    values = codes.values.movedim(1, -1).flatten(1, -2)  # [out, taps, in / groups]
    out, taps, length = values.shape
    whole = operand(replace(_in_rows(codes), values=values.reshape(out * taps, length)))
    rows = torch.arange(out * taps, device=values.device).reshape(groups, out // groups, taps)
    for group in range(groups):
        for tap in range(taps):
            which = rows[group, :, tap]
            offset = None if whole.offset is None else whole.offset[which]
            yield replace(whole, codes=whole.codes[which], scale=whole.scale[which], offset=offset)


def _in_rows(codes: Codes) -> Codes:
    """Return codes of a convolution whose scales are those of rows (output, tap)."""
    if codes.grouping.block is not None or codes.grouping.granularity == "tensor":
        return replace(codes, grouping=replace(codes.grouping, axis=0, contraction=1))
    taps = codes.values[0, 0].numel()
    spread = {
        name: value.repeat_interleave(taps)
        for name in ("scale", "zero_point", "offset")
        if (value := getattr(codes, name)) is not None
    }
    return replace(codes, grouping=Grouping("channel", 0, 1), **spread)


def _convolve(codes: Codes, taps: list[Operand], layer: Any) -> Tensor:
    """Return the convolution of codes [N, C, ...] (or [C, ...]) with the taps, [N, out, ...], but for the bias."""
    dims, groups = len(layer.kernel_size), layer.groups
    batched = codes.values.ndim == dims + 2
    values = codes.values.movedim(-1 - dims, -1)
    channels = values.shape[-1]
    grouping = replace(codes.grouping, axis=values.ndim - 1, contraction=values.ndim - 1)
    x = operand(replace(codes, values=values, grouping=grouping))
    places = values.shape[:-1]
    planes = [None if t is None else t.reshape(*places, t.shape[1]) for t in (x.codes, x.scale, x.offset)]
    planes = [None if t is None else _pad(t, layer) for t in planes]
    out: list[Tensor] = []
    width = channels // groups
    for group in range(groups):
        total: Any = 0
        for tap, weight in zip(_tap_indices(layer), taps[group * len(taps) // groups :]):
            here = [None if t is None else _window(t, tap, layer) for t in planes]
            shape = here[0].shape[:-1]  # type: ignore[union-attr]
            rows = [None if t is None else t.reshape(-1, t.shape[-1]) for t in here]
            total = total + affine_matmul(_channels(rows, x, group * width, width), weight)
        out.append(total.reshape(*shape, total.shape[1]))
    y = torch.cat(out, -1).movedim(-1, 1 if batched else 0)
    return y.to(codes.dtype)


def _channels(rows: list[Any], x: Operand, start: int, width: int) -> Operand:
    """Return the channels of one group of a convolution as an operand; blocks must not straddle groups."""
    codes, scale, offset = rows
    if codes.shape[1] == width:
        return replace(x, codes=codes, scale=scale, offset=offset)
    if scale.shape[1] > 1:
        if width % x.block:
            raise QuantizationError(
                f"blocks of {x.block} input channels straddle the groups of {width} of a convolution: use blocks that "
                "divide the group"
            )
        which = slice(start // x.block, (start + width) // x.block)
        scale, offset = scale[:, which], None if offset is None else offset[:, which]
    block = min(x.block, width)
    return replace(x, codes=codes[:, start : start + width], scale=scale, offset=offset, block=block)


def _pad(plane: Tensor, layer: Any) -> Tensor:
    """Pad [N, ..., C] in space by zeros; where scale and offset are zero, so is the value, whatever the code."""
    sides: list[int] = [0, 0]
    for axis in range(len(layer.kernel_size) - 1, -1, -1):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [0, 0] if layer.padding == "valid" else [layer.padding[axis]] * 2
    return torch.nn.functional.pad(plane, sides)


def _tap_indices(layer: Any) -> Iterator[tuple[int, ...]]:
    """Yield the position of each kernel tap, row-major."""
    sizes = layer.kernel_size
    for flat in range(torch.Size(sizes).numel()):
        index = []
        for size in reversed(sizes):
            index.append(flat % size)
            flat //= size
        yield tuple(reversed(index))


def _window(plane: Tensor, tap: tuple[int, ...], layer: Any) -> Tensor:
    """Return what a kernel tap sees of a padded plane [(N,) ..., C]."""
    first = plane.ndim - 1 - len(tap)
    for axis, (at, size, stride, dilation) in enumerate(zip(tap, layer.kernel_size, layer.stride, layer.dilation)):
        length = plane.shape[first + axis]
        count = (length - dilation * (size - 1) - 1) // stride + 1
        start = at * dilation
        which = [slice(None)] * plane.ndim
        which[first + axis] = slice(start, start + stride * (count - 1) + 1, stride)
        plane = plane[tuple(which)]
    return plane
