"""What becomes of the result of a fusion node: which layers take it in, and what else uses it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fewbits.layers.balance import FusionOwner
from fewbits.layers.fusion import fusion_nodes
from fewbits.layers.record import Record, record
from fewbits.layers.swap import float_class, quantizable

CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Consumers:
    """layers: names of those that take the node's result as it is. other: functions that use it, too, or "the model's
    caller". widths: channels of each branch. norms: by layer, the batch norm that alone takes that layer's result.
    shared: layers that also run on something else than this result."""

    layers: tuple[str, ...]
    other: tuple[str, ...]
    widths: tuple[int, ...]
    norms: dict[str, str]
    shared: tuple[str, ...]


def find_consumers(model: nn.Module, example: Any) -> dict[str, Consumers]:
    """Return the consumers of each fusion node, by node, in the order in which the nodes run on the example."""
    seen = record(model, example)
    nodes = fusion_nodes(model)
    paths = {_path(model, name): name for name in nodes}
    found = {}
    for path, args in dict(seen.entered).items():
        if path in paths:
            axis, output = nodes[paths[path]].axis, seen.made[path][0]
            layers = _fitting(model, axis, len(seen.entries[output].shape))
            widths = tuple(seen.entries[a].shape[axis] for a in args)
            found[paths[path]] = _consumers(model, seen, output, widths, layers)
            if len(seen.made[path]) > 1:
                found[paths[path]] = replace(found[paths[path]], other=("more than one run of it",))
    return found


def _fitting(model: nn.Module, axis: int, ndim: int) -> set[str]:
    """Return the linear layers and convolutions that contract this axis of a tensor of so many axes."""
    layers: dict[str, Any] = quantizable(model)
    spatial = {n: len(m.kernel_size) for n, m in layers.items() if isinstance(m, CONVOLUTIONS)}
    linear = dict.fromkeys((n for n, m in layers.items() if isinstance(m, nn.Linear)), 0)
    return {name for name, dims in {**spatial, **linear}.items() if ndim - 1 - dims == axis}


def _path(model: nn.Module, name: str) -> str:
    """Return the module path of a node."""
    owner, _, key = name.rpartition(".")
    inside = f"{owner}.fusions.{key}" if owner else f"fusions.{key}"
    return inside if isinstance(model.get_submodule(owner), FusionOwner) else name


def _consumers(model: nn.Module, seen: Record, output: int, widths: tuple[int, ...], layers: set[str]) -> Consumers:
    found: dict[str, None] = {}
    other: dict[str, None] = {"the model's caller": None} if output in seen.returned else {}
    for use in seen.uses(output):
        entry = seen.entries[use]
        layer = next((owner for owner in entry.owners if owner in layers), None)
        (other if layer is None else found).setdefault(entry.op if layer is None else layer)
    runs = [(name, given) for name, given in seen.entered if name in found]
    shared = tuple(dict.fromkeys(name for name, given in runs if given[:1] != (output,)))
    norms = {layer: norm for layer in found if (norm := _norm(model, seen, layer)) is not None}
    return Consumers(tuple(found), tuple(other), widths, norms, shared)


def _norm(model: nn.Module, seen: Record, layer: str) -> str | None:
    """Return the batch norm that is the only one to use what the layer returns."""
    users = [seen.entries[use] for entry in seen.made.get(layer, ()) for use in seen.uses(entry)]
    names = {user.owners[-1] if user.owners else "" for user in users}
    name = names.pop() if len(names) == 1 else ""
    return name if name and issubclass(float_class(model.get_submodule(name)), NORMS) else None
