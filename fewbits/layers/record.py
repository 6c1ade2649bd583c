"""Record one forward of a model: which torch functions and modules made which tensor from which; nothing is traced.

Tensors become entries in the order in which they are made. The calls of a module are those that its own forward makes,
and not those of its children.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fewbits.layers.swap import call, in_eval, set_mode
from fewbits.layers.watch import tensors


@dataclass
class Entry:
    """A tensor. op: the name of the function that made it ("input" where none did, "module" where all is hidden).

    owners: the modules that ran, the innermost last. parents: entries that it was made from. origins: all entries that
    it comes from, itself too, but not by way of a gate that it was multiplied by, as the bits of an integer. nth: which
    call of this op by the innermost owner, from 0.
    """

    op: str
    owners: tuple[str, ...]
    parents: tuple[int, ...]
    origins: int
    shape: tuple[int, ...]
    nth: int = 0
    axis: int = 0  # of a cat
    branches: tuple[int, ...] = ()  # of a cat or add: entries, in the order of its arguments
    fits: bool = False  # a cat or add that a fusion node can take over


@dataclass
class Record:
    """All entries of a forward. entered: (module, entries of its arguments); returned: what the model returns."""

    entries: list[Entry] = field(default_factory=list)
    entered: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    made: dict[str, list[int]] = field(default_factory=dict)  # by module: entries that it returned
    returned: tuple[int, ...] = ()

    def uses(self, entry: int) -> list[int]:
        """Return the entries that were made directly from this one."""
        return [i for i, e in enumerate(self.entries) if entry in e.parents]


GATES = ("sigmoid", "hardsigmoid", "softmax")
CATS = ("cat", "concat", "concatenate")
ADDS = ("add", "add_")


class Recorder(TorchFunctionMode):
    """Context manager around one forward of ``model``; fills ``record``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.record, self.model = Record(), model
        self.known: dict[int, int] = {}  # entry by the id of its tensor
        self.kept: list[Tensor] = []  # so that no id is given out twice
        self.stack: list[tuple[str, dict[str, int]]] = []  # modules that run, with their calls by op
        self.handles: list[Any] = []

    def __enter__(self) -> Recorder:
        for name, module in self.model.named_modules():
            enter, leave = functools.partial(self._enter, name), functools.partial(self._leave, name)
            self.handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self.handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()

    def entry_of(self, tensor: Tensor) -> int:
        """Return the entry of a tensor; one that nothing has made is an input."""
        if id(tensor) not in self.known:
            self._add(tensor, "input", ())
        return self.known[id(tensor)]

    def _add(self, tensor: Tensor, op: str, parents: tuple[int, ...], **more: Any) -> Entry:
        entries, index = self.record.entries, len(self.record.entries)
        origins = 1 << index
        for parent in parents:
            if op != "mul" or entries[parent].op not in GATES:
                origins |= entries[parent].origins
        entries.append(Entry(op, tuple(n for n, _ in self.stack), parents, origins, tuple(tensor.shape), **more))
        self.known[id(tensor)] = index
        self.kept.append(tensor)
        return entries[index]

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.record.entered.append((name, tuple(self.entry_of(t) for t in tensors((args, kwargs)))))
        self.stack.append((name, {}))

    def _leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.stack.pop()
        for tensor in tensors(output):
            if id(tensor) not in self.known:  # made where no function could be seen
                self._add(tensor, "module", tuple(self.entry_of(t) for t in tensors((args, kwargs))))
            self.record.made.setdefault(name, []).append(self.known[id(tensor)])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call func, and note what it has made from what."""
        kwargs = kwargs or {}
        op = getattr(func, "__name__", "")
        before = [self.entry_of(t) for t in tensors((args, kwargs)) if not isinstance(t, nn.Parameter)]
        more: dict[str, Any] = self._count(op, args, kwargs)
        result = func(*args, **kwargs)
        for tensor in tensors(result):
            if id(tensor) in self.known and not op.endswith("_"):
                continue  # the very tensor that was given, as dropout does it in eval mode
            self._add(tensor, op, tuple(dict.fromkeys(before)), **more)
        return result

    def _count(self, op: str, args: Any, kwargs: Any) -> dict[str, Any]:
        """Return what there is to say of a cat or an add of tensors; all are counted, as by ``balance``."""
        joined = operands(op, args, kwargs)
        if joined is None or not self.stack:
            return {}
        kind, given, axis = joined
        counts = self.stack[-1][1]
        nth = counts[kind] = counts.get(kind, -1) + 1
        shapes = [list(t.shape) for t in given]
        rest = [s[:axis] + s[axis:][1:] for s in shapes] if kind == "cat" else shapes
        fits = len(given) > 1 and given[0].ndim > 2 and axis > 0 and all(s == rest[0] for s in rest)
        branches = tuple(self.entry_of(t) for t in given)
        return {"nth": nth, "axis": axis, "branches": branches, "fits": fits and len(set(branches)) > 1}


def operands(op: str, args: Any, kwargs: Any) -> tuple[str, list[Tensor], int] | None:
    """Return ("cat" or "add", tensors, axis) of a call, or None where it is neither, or adds no two float tensors."""
    if op in CATS:
        given = list(args[0] if args else kwargs["tensors"])
        axis = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        if not given or not all(isinstance(t, Tensor) and t.is_floating_point() for t in given):
            return None
        return "cat", given, int(axis) % max(given[0].ndim, 1)
    if op in ADDS and kwargs.keys() <= {"other", "input", "alpha"} and kwargs.get("alpha", 1) == 1:
        given = [*args, *(v for k, v in kwargs.items() if k != "alpha")]
        if len(given) == 2 and all(isinstance(t, Tensor) and t.is_floating_point() and t.ndim > 2 for t in given):
            return "add", given, 1
    return None


def record(model: nn.Module, example: Any) -> Record:
    """Run a batch through the model in eval mode, quantizers off and without gradients; return what happened."""
    with in_eval(model), set_mode(model, "float"), torch.no_grad(), Recorder(model) as recorder:
        returned = call(model, example)
        recorder.record.returned = tuple(recorder.entry_of(t) for t in tensors(returned))
    return recorder.record
