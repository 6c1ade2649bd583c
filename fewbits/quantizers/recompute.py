"""Quantized tensors that are computed again in backward instead of being kept.

A convolution or matmul saves its operands for its weight gradient. Where an operand was quantized by us, it is enough
to save how to compute it from the input of the quantizer, which the layer before has usually saved already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor


class Recomputable(torch.autograd.Function):
    """An autograd function of a quantizer whose output ``recomputed`` computes again from what it has saved.

    A subclass sets ``ctx.again = None`` in forward, says in ``compute`` how to get the output from the saved tensors,
    the first of which is its input, in the memory layout of the first time, and reads them in backward by ``recall``.
    """

    @staticmethod
    def compute(ctx: Any, *saved: Any) -> Tensor:
        """Return the output of forward once more."""
        raise NotImplementedError

    @classmethod
    def recompute(cls, ctx: Any) -> Tensor:
        """Return the output of forward once more; kept, with what was saved, until backward has used it."""
        if ctx.again is None:
            saved = ctx.saved_tensors
            ctx.again = saved, cls.compute(ctx, *saved), saved[0]._version
        return ctx.again[1]  # type: ignore[no-any-return]


def recall(ctx: Any) -> tuple[tuple[Any, ...], Tensor | None]:
    """Return what was saved, and the output if it was recomputed meanwhile; forget both."""
    saved, y, version = ctx.again or (None, None, None)
    ctx.again = None
    if saved is None or saved[0]._version != version:
        return ctx.saved_tensors, None  # only here: inside a checkpoint it can be read just once
    return saved, y


def remember(y: Tensor, function: type[Recomputable], output: Tensor) -> None:
    """Note on y, which is the output of ``function`` or a view of all of it, that it can be recomputed."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or output.grad_fn is None:
        return
    if y.data_ptr() == output.data_ptr():
        y.recompute = partial(function.recompute, output.grad_fn)  # type: ignore[attr-defined]


@contextmanager
def recomputed(*tensors: Tensor | None) -> Iterator[None]:
    """Inside, operations that would save one of these quantized tensors for backward save how to recompute it.

    Tensors that carry no ``recompute`` (they do not come from a ``Recomputable``) are saved as usual.
    """
    known = [t for t in tensors if t is not None and hasattr(t, "recompute")]
    if not known or torch.compiler.is_compiling():
        yield
        return
    ways = {t.untyped_storage().data_ptr(): t.recompute for t in known}

    def pack(t: Tensor) -> Any:
        way = ways.get(t.untyped_storage().data_ptr())
        return t if way is None else (way, t.shape, t.stride(), t.storage_offset())

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        way, *view = saved
        again: Tensor = way()
        return again.as_strided(*view)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
