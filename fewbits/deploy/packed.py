"""Packed layers: the twin of a layer whose float weight is gone, and whose codes are all that is left.

A packed layer is its quantized twin with ``weight`` decoded from codes on access, so it runs the very operation
that was trained, for every layer type, without a line of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.deploy.bits import gather_kept, pack_bits, pack_rows, scatter_kept, unpack_bits, unpack_rows
from fewbits.errors import PackedFileError
from fewbits.layers import QuantizedLayer, twin_class
from fewbits.plan import Sparsity
from fewbits.quantizers import Codes, Grid, Grouping


class PackedWeight(nn.Module):
    """Codes of one weight as a dense bit stream.

    Buffers: codes (uint8 bytes), scale [G] float32, zero_point [G] int32 or None, offset [G] float32 or None. Of an N:M
    sparse weight only the N codes of each group are there, with their positions (uint8 bytes; None where dense). Of one
    whose channels differ in width, the channels of each width are a stream of their own, the narrowest first.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    offset: Tensor | None
    positions: Tensor | None
    sparsity: Sparsity | None = None
    channel_bits: tuple[int, ...] | None = None

    def __init__(self, codes: Codes | None = None) -> None:
        super().__init__()
        for name in ("codes", "positions", "scale", "zero_point", "offset"):
            self.register_buffer(name, None)
        if codes is not None:
            self.put(codes)

    def put(self, codes: Codes) -> None:
        """Take over codes."""
        self.grid, self.grouping, self.dtype = codes.grid, codes.grouping, codes.dtype
        self.shape, self.sparsity = tuple(codes.values.shape), codes.sparsity
        self.channel_bits = codes.channel_bits
        values, device = codes.values.cpu(), codes.scale.device
        if codes.sparsity is not None:
            values, positions = gather_kept(values, codes.sparsity, codes.grouping.contraction)
            self.positions = pack_bits(positions, codes.sparsity.position_bits).to(device)
        if codes.channel_bits is None:
            packed = pack_bits(codes.grid.index(values), codes.bits)
        else:
            packed = pack_rows(codes.grouping.rows(values)[0], codes.channel_bits)
        self.codes = packed.to(device)
        self.scale, self.zero_point, self.offset = codes.scale, codes.zero_point, codes.offset

    def get(self) -> Codes:
        """Return the codes."""
        grid, grouping, pattern, count = self.grid, self.grouping, self.sparsity, math.prod(self.shape)
        kept = count if pattern is None else pattern.count(count)
        if self.channel_bits is not None:
            rows = unpack_rows(self.codes.cpu(), self.channel_bits, count // len(self.channel_bits))
            values = grouping.merge([rows], self.shape)
        else:
            values = grid.value(unpack_bits(self.codes.cpu(), grid.bits, kept)).to(torch.int32)
        if pattern is None:
            values = values.reshape(self.shape)
        else:
            if self.positions is None:
                raise PackedFileError(f"a {pattern} sparse weight of shape {self.shape} has no positions")
            positions = unpack_bits(self.positions.cpu(), pattern.position_bits, kept)
            values = scatter_kept(values, positions, pattern, self.shape, grouping.contraction)
        values = values.to(self.scale.device)
        widths = self.channel_bits
        return Codes(values, self.scale, self.zero_point, self.offset, grid, grouping, self.dtype, pattern, widths)

    def decode(self) -> Tensor:
        """Return the real weight."""
        return self.get().decode()

    def get_extra_state(self) -> dict[str, Any]:
        """Return all that is not a tensor, as plain data."""
        grid, grouping = self.grid, self.grouping
        sparse = {} if self.sparsity is None else {"sparsity": str(self.sparsity)}
        mixed = {} if self.channel_bits is None else {"channel_bits": list(self.channel_bits)}
        return {
            **sparse,
            **mixed,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "grid": [grid.bits, grid.lowest, grid.highest, grid.step],
            "grouping": [grouping.granularity, grouping.axis, grouping.contraction, grouping.block],
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Undo ``get_extra_state``."""
        self.grid, self.grouping = Grid(*state["grid"]), Grouping(*state["grouping"])
        self.shape, self.dtype = tuple(state["shape"]), getattr(torch, state["dtype"])
        self.sparsity = Sparsity.parse(state["sparsity"]) if "sparsity" in state else None
        self.channel_bits = tuple(state["channel_bits"]) if "channel_bits" in state else None

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the tensors as they come: their sizes are known only from the file."""
        for name in self._buffers:
            self._buffers[name] = state.get(prefix + name)
        self.set_extra_state(state[prefix + "_extra_state"])


class PackedLayer(QuantizedLayer):
    """Mixin in front of a quantized twin: the weight parameter is gone, reading it decodes ``packed``."""

    packed: PackedWeight

    def __getattr__(self, name: str) -> Any:
        if name == type(self).weight_name:
            weight = self.packed.decode()
            weight.fewbits_layer = self  # type: ignore[attr-defined]  # for owners that read a child's weight
            return weight
        return super().__getattr__(name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self.float_class,), self.__dict__


def pack_layer(layer: QuantizedLayer, packed: PackedWeight) -> None:
    """Turn a quantized layer into a packed one, in place."""
    layer.__class__ = packed_class(layer.float_class)
    del layer._parameters[layer.weight_name]
    layer.weight_quantizer = None
    layer.packed = packed


_CLASSES: dict[type, type[PackedLayer]] = {}


def packed_class(float_class: type[nn.Module]) -> type[PackedLayer]:
    """Return the packed twin of a layer class, always the same one."""
    if float_class not in _CLASSES:
        twin = twin_class(float_class)
        if twin is None:
            raise PackedFileError(f"{float_class.__name__} has no quantized twin: import what registers it first")
        namespace = {"float_class": float_class, "__module__": __name__}
        _CLASSES[float_class] = type(f"Packed{float_class.__name__}", (PackedLayer, twin), namespace)
    return _CLASSES[float_class]


def _rebuild(float_class: type[nn.Module]) -> PackedLayer:
    cls = packed_class(float_class)
    return cls.__new__(cls)
