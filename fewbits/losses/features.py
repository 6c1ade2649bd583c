"""What a student and its teacher make of the same batch at the same places, by module name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import TrainingError, nearest
from fewbits.layers import call
from fewbits.layers.watch import tensors


class FeatureTaps:
    """Context in which student and teacher run, and which then has the results of the tapped modules of both.

    names: of modules that both models have. The teacher runs no further than its last tap. Raises TrainingError for
    unknown names.

        with FeatureTaps(student, teacher, ["backbone"]) as taps:
            loss = task_loss(student(x), y)
            taps.teach(x)
            loss = loss + sum(mse_loss(mine, theirs) for _, mine, theirs in taps.pairs())
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, names: Sequence[str]) -> None:
        known = [name for name, _ in teacher.named_modules()]
        for name in names:
            if name not in known or name not in dict(student.named_modules()):
                raise TrainingError(f"no module {name!r} to tap{nearest(name, known)}; it must be in both models")
        if not names:
            raise TrainingError("no modules to tap are named: give the blocks that feed the head")
        self.student, self.teacher, self.names = student, teacher, tuple(names)
        self._handles: list[Any] = []
        self._seen: dict[str, list[Any]] = {}
        self._targets: dict[str, list[Any]] = {}

    def __enter__(self) -> FeatureTaps:
        self._seen, self._targets = {}, {}
        for name in self.names:
            self._tap(name, self.student, self._seen.setdefault(name, []))
            self._tap(name, self.teacher, self._targets.setdefault(name, []))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _tap(self, name: str, model: nn.Module, found: list[Any]) -> None:
        module = model.get_submodule(name)
        self._handles.append(module.register_forward_hook(lambda m, args, y: found.append(y)))

    def teach(self, batch: Any) -> Any:
        """Run the teacher on the student's batch (as for ``calibrate``), without gradients, up to its last tap."""
        modules = {self.teacher.get_submodule(name) for name in self.names}
        stops = [module.register_forward_hook(self._stop) for module in modules]
        try:
            with torch.no_grad():
                call(self.teacher, batch)
        except _AllSeen:
            pass
        finally:
            for handle in stops:
                handle.remove()

    def _stop(self, *_: object) -> None:
        if all(len(self._targets[name]) >= len(self._seen[name]) for name in self.names):
            raise _AllSeen

    def runs(self, name: str) -> list[tuple[Any, Any]]:
        """Return (student's, teacher's) result of every run of a tap. Raises TrainingError where they did not pair."""
        mine, theirs = self._seen[name], self._targets[name]
        if not mine or len(mine) != len(theirs):
            raise TrainingError(
                f"tap {name!r} ran {len(mine)} times in the student and {len(theirs)} times in the teacher: inside "
                "the context, call the student and then teach(batch), once each"
            )
        return list(zip(mine, theirs))

    def pairs(self) -> list[tuple[str, Tensor, Tensor]]:
        """Return (tap, student's tensor, teacher's), in the order of the names; each tensor of a tuple is one.

        Raises TrainingError where their shapes differ, and for a tap that returns no tensor.
        """
        found = []
        for name in self.names:
            for student, teacher in self.runs(name):
                mine, theirs = tensors(student), tensors(teacher)
                shapes = [[list(t.shape) for t in some] for some in (mine, theirs)]
                if shapes[0] != shapes[1]:
                    raise TrainingError(f"tap {name!r} returns {shapes[0]} in the student, {shapes[1]} in the teacher")
                if not mine:
                    raise TrainingError(
                        f"tap {name!r} returns no tensor, but {type(student).__name__}: tap another module"
                    )
                found += [(name, m, t) for m, t in zip(mine, theirs)]
        return found


def gradient_ratio(part: Tensor, rest: Tensor, at: Sequence[Tensor]) -> float:
    """Return the norm of the gradient of one loss at some tensors over that of another, such as of distillation over
    the task's at features; aim at 0.05 to 0.5. Infinite where the other has no gradient there. Both graphs stay."""

    def norm(loss: Tensor) -> float:
        grads = torch.autograd.grad(loss, list(at), retain_graph=True, allow_unused=True)
        return math.sqrt(sum(float(g.float().square().sum()) for g in grads if g is not None))

    below = norm(rest)
    return norm(part) / below if below > 0 else math.inf


class _AllSeen(Exception):  # noqa: N818
    """The teacher has run past its last tap."""
