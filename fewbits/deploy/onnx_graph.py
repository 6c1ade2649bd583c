"""Finishing touches on an exported ONNX graph: one Q/DQ per tensor, narrow weights, no ballast."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

SHARED_OPS = ("QuantizeLinear", "DequantizeLinear", "Clip", "Div", "Round", "Mul", "Sub", "Add")


def finish_graph(proto: Any, weight_types: Mapping[str, str], *, short: bool) -> None:
    """Share equal quantization nodes, narrow the weights, and drop what only debuggers read, in place.

    weight_types: INT8, INT4, INT2 (or U...) by initializer name. short: give everything short names.
    """
    graph = proto.graph
    _merge_equal_constants(graph)
    while _merge_equal_nodes(graph):
        pass
    _drop_unused(graph)
    for tensor in graph.initializer:
        kind = weight_types.get(tensor.name, "INT8")
        if kind not in ("INT8", "UINT8"):
            _narrow(tensor, kind)
    _narrow_points(graph, weight_types)
    for item in (proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        for field in ("metadata_props", "doc_string"):
            if field in item.DESCRIPTOR.fields_by_name:
                item.ClearField(field)
    del graph.value_info[:]
    if short:
        _shorten(graph)


def _merge_equal_constants(graph: Any) -> None:
    """Keep one of several small initializers with the same content."""
    first: dict[Any, str] = {}
    rename: dict[str, str] = {}
    for tensor in graph.initializer:
        if np.prod(tensor.dims, dtype=int) <= 1:
            key = (tensor.data_type, tuple(tensor.dims), _content(tensor))
            rename[tensor.name] = first.setdefault(key, tensor.name)
    _rename_inputs(graph, rename)


def _content(tensor: Any) -> bytes:
    from onnx import numpy_helper

    return bytes(numpy_helper.to_array(tensor).tobytes())


def _merge_equal_nodes(graph: Any) -> bool:
    """Merge quantization nodes with equal operator, inputs and attributes: one Q/DQ a tensor, not one a consumer."""
    first: dict[Any, Any] = {}
    rename: dict[str, str] = {}
    outputs = {o.name for o in graph.output}
    for node in graph.node:
        if node.op_type not in SHARED_OPS or node.output[0] in outputs:
            continue
        key = (node.op_type, tuple(node.input), tuple(a.SerializeToString() for a in node.attribute))
        kept = first.setdefault(key, node)
        if kept is not node:
            rename[node.output[0]] = kept.output[0]
    if rename:
        keep = [n for n in graph.node if n.output[0] not in rename]
        del graph.node[:]
        graph.node.extend(keep)
        _rename_inputs(graph, rename)
    return bool(rename)


def _drop_unused(graph: Any) -> None:
    used = {name for node in _all_nodes(graph) for name in node.input} | {o.name for o in graph.output}
    keep = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(keep)


def _narrow(tensor: Any, kind: str) -> None:
    """Store an int8 initializer as INT4 or INT2, least significant element first."""
    from onnx import TensorProto, numpy_helper

    bits = int(kind[-1])
    values = numpy_helper.to_array(tensor).reshape(-1).astype(np.uint8) & (2**bits - 1)
    per_byte = 8 // bits
    padded = np.pad(values, (0, -len(values) % per_byte)).reshape(-1, per_byte)
    packed = (padded << (np.arange(per_byte, dtype=np.uint8) * bits)).sum(1).astype(np.uint8)
    tensor.data_type = getattr(TensorProto, kind)
    tensor.ClearField("int32_data")
    tensor.raw_data = packed.tobytes()


def _narrow_points(graph: Any, weight_types: Mapping[str, str]) -> None:
    """Give the zero points of narrowed weights the type of their weight."""
    tensors = {t.name: t for t in graph.initializer}
    for node in graph.node:
        kind = weight_types.get(node.input[0], "INT8") if node.op_type == "DequantizeLinear" else "INT8"
        if not kind.endswith("INT8") and len(node.input) > 2:
            _narrow(tensors[node.input[2]], kind)


def _shorten(graph: Any) -> None:
    """Rename every value and node inside the graph; inputs and outputs keep their names."""
    public = {v.name for v in (*graph.input, *graph.output)}
    names = (n for n in _short_names() if n not in public)
    rename: dict[str, str] = {}
    for value in [*(t.name for t in graph.initializer), *(o for n in graph.node for o in n.output)]:
        if value and value not in public and value not in rename:
            rename[value] = next(names)
    _rename_inputs(graph, rename)
    for tensor in graph.initializer:
        tensor.name = rename.get(tensor.name, tensor.name)
    for node in graph.node:
        node.ClearField("name")
        for i, name in enumerate(node.output):
            node.output[i] = rename.get(name, name)


def _short_names() -> Iterator[str]:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for length in itertools.count(1):
        yield from map("".join, itertools.product(letters, repeat=length))


def _rename_inputs(graph: Any, rename: Mapping[str, str]) -> None:
    for node in _all_nodes(graph):
        for i, name in enumerate(node.input):
            node.input[i] = rename.get(name, name)


def _all_nodes(graph: Any) -> Iterator[Any]:
    """Walk the nodes of a graph and of the subgraphs inside If, Loop and Scan."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _all_nodes(attribute.g)
