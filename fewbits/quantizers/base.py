"""The quantizer: one tensor to few bits and back, with a gradient path.

A quantizer has three verbs: ``calibrate``, ``forward`` and ``encode``; ``decode(encode(x)) == forward(x)`` holds
exactly. A new one is a file with a subclass that is registered by name (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewbits.errors import PlanError, QuantizationError, nearest
from fewbits.plan import TensorPlan
from fewbits.quantizers.codes import Codes
from fewbits.quantizers.grouping import Grouping
from fewbits.quantizers.sparsity import find_pruned

QUANTIZERS: dict[str, type[Quantizer]] = {}


def register_quantizer(name: str) -> Callable[[type[Quantizer]], type[Quantizer]]:
    """Class decorator: make a quantizer known by name to plans and packed files."""

    def add(cls: type[Quantizer]) -> type[Quantizer]:
        if QUANTIZERS.setdefault(name, cls) is not cls:
            raise PlanError(f"a quantizer named {name!r} is registered already: {QUANTIZERS[name].__name__}")
        return cls

    return add


class Quantizer(nn.Module):
    """Base of all quantizers.

    plan: bits, symmetry, granularity and options. grouping: the same granularity with its axes. groups: number of
    rows G of the tensor, hence of scales. Lazily calibrated: the first tensor it sees in training sets its range.
    """

    is_quantizer: ClassVar[bool] = True  # trainers put our parameters in a group without weight decay
    lr_scale: float = 1.0
    label: str = ""  # whose we are, for errors: "input of layer 'conv1': "
    dynamic: ClassVar[bool] = False  # True: statistics come from each tensor anew, so there is nothing to calibrate
    has_offset: ClassVar[bool] = False  # True: where not symmetric, codes come with a real offset, not a zero point
    can_prune: ClassVar[bool] = False  # True: follows ``plan.sparsity``
    can_mix: ClassVar[bool] = False  # True: follows ``plan.channel_bits``

    def __init__(self, plan: TensorPlan, grouping: Grouping, groups: int) -> None:
        super().__init__()
        self.plan, self.grouping, self.groups = plan, grouping, groups
        self.calibrated = 0  # batches seen

    @property
    def bits(self) -> int:
        """Width of a code in bits."""
        return self.plan.bits

    @classmethod
    def weight_options(cls, bits: int) -> dict[str, Any]:
        """Return the options that suit a weight of this width best; allocations put them into their plans."""
        return {}

    def calibrate(self, x: Tensor) -> None:
        """Take the range from x; a further call widens or averages it. Raises QuantizationError on NaN or Inf."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return x fake-quantized, same shape and dtype, with a gradient path to x and to our parameters."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Codes:
        """Return the integer codes of x. Raises QuantizationError on NaN or Inf."""
        raise NotImplementedError

    def step(self) -> Tensor | None:
        """Return the distance of neighbouring levels in units of the input, [G], detached; None where it varies."""
        return None

    def pruned(self, x: Tensor) -> Tensor | None:
        """Return where the plan's sparsity makes x zero, bool of the shape of x; None where the plan is dense."""
        pattern = self.plan.pattern
        return None if pattern is None else find_pruned(x.detach(), pattern, self.grouping.contraction)

    def reset(self) -> None:
        """Forget the range, so that the next tensor sets it."""
        self.calibrated = 0

    def require_finite(self, x: Tensor) -> None:
        """Raise QuantizationError if x holds NaN or Inf."""
        finite = torch.isfinite(x)
        if not bool(finite.all()):
            bad = int((~finite).sum())
            raise QuantizationError(
                f"{self.label}{bad} of {x.numel()} values are NaN or Inf (shape {tuple(x.shape)}); "
                "a code cannot stand for them: look for the layer or the sample where they first appear"
            )

    def require_range(self) -> None:
        """Raise QuantizationError if no tensor has set the range yet."""
        if not self.calibrated and not self.dynamic:
            raise QuantizationError(
                f"{self.label}this quantizer has no range yet: "
                "run fewbits.calibrate(model, batches), or train a step, first"
            )

    def get_extra_state(self) -> dict[str, int]:
        """Return what a checkpoint needs beside tensors."""
        return {"calibrated": self.calibrated}

    def set_extra_state(self, state: Mapping[str, int]) -> None:
        """Undo ``get_extra_state``."""
        self.calibrated = int(state["calibrated"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A float checkpoint has no quantizer state: accept it, and take the range anew from what it brings."""
        if not any(key.startswith(prefix) for key in state_dict):
            self.reset()
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Show bits, symmetry and granularity in ``print(model)``."""
        kind = "symmetric" if self.plan.symmetric else "affine"
        block = f" {self.grouping.block}" if self.grouping.block else ""
        sparse = f", {self.plan.sparsity} sparse" if self.plan.sparsity else ""
        return f"{self.bits} bit, {kind}, per {self.grouping.granularity}{block}{sparse}"


def quantizer_class(name: str) -> type[Quantizer]:
    """Return the quantizer of that name. Raises PlanError, with near names, if there is none."""
    if name not in QUANTIZERS:
        raise PlanError(f"unknown quantizer {name!r}{nearest(name, QUANTIZERS)}; known: {sorted(QUANTIZERS)}")
    return QUANTIZERS[name]


def make_quantizer(
    plan: TensorPlan,
    *,
    shape: tuple[int, ...] | None = None,
    channels: int = 1,
    axis: int = 0,
    contraction: int = 1,
) -> Quantizer:
    """Build the quantizer that a plan names.

    shape: of the tensor where it is fixed (a weight); for activations give channels, the size of ``axis``.
    Raises PlanError for an unknown name or option.
    """
    cls = quantizer_class(plan.quantizer)
    if shape is None and plan.granularity == "block" and not cls.dynamic:
        raise PlanError(f"quantizer {plan.quantizer!r} is static: blocks of an activation need a dynamic one")
    grouping = Grouping(plan.granularity, axis, contraction, plan.block)
    _check_sparsity(plan, cls, grouping, shape)
    one = plan.granularity == "tensor"
    groups = grouping.count(shape) if shape is not None else 1 if one else channels
    _check_channels(plan, cls, groups)
    try:
        return cls(plan, grouping, groups, **plan.options)
    except TypeError as error:
        raise PlanError(f"quantizer {plan.quantizer!r} cannot take options {dict(plan.options)}: {error}") from error


def _check_channels(plan: TensorPlan, cls: type[Quantizer], groups: int) -> None:
    """Raise PlanError where this quantizer or this tensor cannot have the plan's widths of channels."""
    if plan.channel_bits is None:
        return
    if not cls.can_mix:
        able = sorted(name for name, known in QUANTIZERS.items() if known.can_mix)
        raise PlanError(
            f"quantizer {plan.quantizer!r} has one width for all channels: drop channel_bits, or take {able}"
        )
    if len(plan.channel_bits) != groups:
        raise PlanError(f"channel_bits has {len(plan.channel_bits)} widths, the tensor {groups} channels")


def _check_sparsity(plan: TensorPlan, cls: type[Quantizer], grouping: Grouping, shape: tuple[int, ...] | None) -> None:
    """Raise PlanError where this quantizer or this tensor cannot have the plan's N:M pattern."""
    pattern = plan.pattern
    if pattern is None:
        return
    if not cls.can_prune:
        raise PlanError(f"quantizer {plan.quantizer!r} has no sparse form: drop sparsity={plan.sparsity!r}")
    if shape is None:
        raise PlanError(f"sparsity={plan.sparsity!r} is for weights: a tensor of unknown shape has no fixed groups")
    length = shape[grouping.contraction]
    if length % pattern.of:
        raise PlanError(
            f"sparsity={plan.sparsity!r} needs a contraction axis of a multiple of {pattern.of}, got {length} (axis "
            f"{grouping.contraction} of shape {shape}): leave this layer dense, or give it another pattern"
        )
    if plan.block is not None and plan.block < length and plan.block % pattern.of:
        raise PlanError(f"block={plan.block} cuts groups of {pattern.of} weights: use a multiple of {pattern.of}")
    if plan.granularity in ("channel", "head") and (grouping.axis - grouping.contraction) % len(shape) == 0:
        raise PlanError(
            f"sparsity={plan.sparsity!r} cannot run along axis {grouping.axis}, which has a scale for each index"
        )
