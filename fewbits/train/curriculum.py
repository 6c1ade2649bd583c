"""A curriculum as data: which parts of a model are quantized and trained from when on (CQAT, arXiv 2603.05964, 3.2).

A model is cut along its data flow into functional modules M_1..M_K. In stage k, M_1..M_k are quantized and trained;
M_{k+1}..M_K run in float and frozen, with gradients through them. ``staging`` does this to a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from torch import nn

from fewbits.errors import TrainingError, nearest
from fewbits.layers import QuantizedLayer
from fewbits.plan import LayerPlan
from fewbits.quantizers import Quantizer

NEVER = 10**9  # the stage of what stays in float and frozen
SUM_ERROR = 1.001e-3  # so that 0.333 three times is one


@dataclass(frozen=True)
class Stage:
    """One stage. quantize: names of submodules that are quantized and trained from this stage on; "" is the model. A
    parameter that no submodule has may be named, too.

    share: of the steps of the run, 0..1. distill: names of the distillation terms in the loss of this stage; those of
    earlier stages that stay are named again. Raises TrainingError for a value out of range.
    """

    quantize: Sequence[str]
    share: float
    distill: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("quantize", "distill"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(v, str) for v in value):
                raise TrainingError(f"{name} of a stage is a sequence of names, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        if not self.quantize:
            raise TrainingError("a stage quantizes no module: name one, or put its share to the stage before it")
        if not 0 < self.share <= 1:
            raise TrainingError(f"share is the part of the steps that a stage takes, above 0 up to 1, got {self.share}")

    @property
    def name(self) -> str:
        """The modules that it adds, as hooks and the log are told of it."""
        return "+".join(name or "(model)" for name in self.quantize)


@dataclass(frozen=True)
class Curriculum:
    """The stages of a training, in their order.

    norms: "train" (batch norms of modules that are reached train as usual) or "frozen" (all keep their running
    statistics, for tiny batches). frozen: names of submodules that stay in float and frozen to the end, such as a text
    encoder. A submodule belongs to the nearest name above it, so "model.backbone" may be one stage and "model", which
    is the rest, another. Raises TrainingError for shares that do not add up to 1 and for a name that is given twice.
    """

    stages: Sequence[Stage]
    norms: Literal["train", "frozen"] = "train"
    frozen: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "frozen", tuple(self.frozen))
        total = sum(stage.share for stage in self.stages)
        if abs(total - 1) > SUM_ERROR:
            raise TrainingError(f"shares of stages add up to 1, got {[s.share for s in self.stages]}: {total:g}")
        if self.norms not in ("train", "frozen"):
            raise TrainingError(f"norms must be 'train' or 'frozen', got {self.norms!r}")
        names = [name for name, _ in self._named()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise TrainingError(f"{twice} is named more than once: a module belongs to one stage, or to frozen")

    def ends(self, total: int) -> list[int]:
        """Return the step at which each stage ends; step i is in the first stage with i / total below its end.

        Raises TrainingError where a stage would have no step.
        """
        ends = [math.ceil(share * total - 1e-6 * total) for share in accumulate(s.share for s in self.stages)]
        ends[-1] = total
        for number, (begin, end) in enumerate(zip([0, *ends], ends), start=1):
            if end <= begin:
                raise TrainingError(
                    f"stage {number} of {len(ends)} has none of the {total} steps: train longer, or give it a larger "
                    "share"
                )
        return ends

    def place(self, name: str) -> int | None:
        """Return the stage, from 0, that a module or parameter belongs to; NEVER for frozen, None for no stage."""
        where = dict(self._named())
        while name not in where and name:
            name = name.rpartition(".")[0]
        return where.get(name)

    def check(self, model: nn.Module) -> None:
        """Raise TrainingError where names and model do not fit.

        That is a name that is no submodule and no parameter, a layer in no stage (unless it is in float and requires no
        grad: it then stays as it is), and a quantized layer that stays frozen.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, _ in self._named():
            if name not in modules and name not in parameters:
                raise TrainingError(f"the curriculum names {name!r}, which this model has not{nearest(name, modules)}")
        planned = [n for n, m in modules.items() if isinstance(m, QuantizedLayer) and m.layer_plan != LayerPlan()]
        placeless = [n.rpartition(".")[0] for n, p in parameters.items() if p.requires_grad and self.place(n) is None]
        trained = [name for name in placeless if not isinstance(modules[name], Quantizer)]
        lost = list(dict.fromkeys([*(name for name in planned if self.place(name) is None), *trained]))
        if lost:
            raise TrainingError(
                f"{len(lost)} layers are in no stage, the first is {lost[0] or '(model)'!r}: add them to a stage, or "
                "to frozen if they shall stay in float and never be trained"
            )
        bad = [name for name in planned if self.place(name) == NEVER]
        if bad:
            raise TrainingError(f"layer {bad[0]!r} is frozen in float, but quantized by the plan: leave it out of one")

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with this one, as plain data."""
        stages = [{"quantize": list(s.quantize), "share": s.share, "distill": list(s.distill)} for s in self.stages]
        return {"stages": stages, "norms": self.norms, "frozen": list(self.frozen)}

    def _named(self) -> Iterator[tuple[str, int]]:
        for number, stage in enumerate(self.stages):
            yield from ((name, number) for name in stage.quantize)
        yield from ((name, NEVER) for name in self.frozen)
