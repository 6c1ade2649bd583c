"""Features of a student and its teacher at the same places, by module name, while both run on the same batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import TrainingError, nearest
from fewbits.layers import QuantizedLayer, call
from fewbits.losses.ada import AttentionAlignment
from fewbits.losses.features import FeatureTaps, gradient_ratio
from fewbits.quantizers import Quantizer


class Taps(FeatureTaps):
    """Context in which student and teacher run, and which then has the loss between their features.

    names: of modules that both models have. Of a quantized layer with an input quantizer it is the input that is
    tapped; of any other module the output, with the quantizer of the first layer that takes it in. Where balanced
    fusion puts a norm into the student, tap the block behind the node: the teacher has no norm. teacher: the float
    model, which is set to eval mode. Raises TrainingError for unknown names and for a teacher of another architecture.

        with Taps(student, teacher, ["neck.p3", "neck.p4"]) as taps:
            loss = task_loss(student(x), y)
            taps.teach(x)
            loss = loss + taps.loss(AttentionAlignment())
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, names: Sequence[str]) -> None:
        check_teacher(student, teacher)
        super().__init__(student, teacher.requires_grad_(False), names)
        # by the id of a feature: itself, so that the id stays its own, and the input quantizer of what takes it in
        self._takers: dict[int, tuple[Tensor, Quantizer]] = {}

    def __enter__(self) -> Taps:
        self._takers = {}
        self.teacher.eval()
        super().__enter__()
        for module in self.student.modules():
            if isinstance(module, QuantizedLayer) and module.input_quantizer is not None:
                self._handles.append(module.register_forward_pre_hook(self._note_taker))
        return self

    def _tap(self, name: str, model: nn.Module, found: list[Any]) -> None:
        module, layer = model.get_submodule(name), self.student.get_submodule(name)
        if isinstance(layer, QuantizedLayer) and layer.input_quantizer is not None:
            self._handles.append(module.register_forward_pre_hook(lambda m, args: found.append(args[0])))
        else:
            super()._tap(name, model, found)

    def _note_taker(self, layer: Any, args: tuple[Any, ...]) -> None:
        if args:
            self._takers.setdefault(id(args[0]), (args[0], layer.input_quantizer))

    def teach(self, batch: Any) -> Any:
        """Run the teacher on the student's batch (as for ``calibrate``), without gradients; return what it returns."""
        with torch.no_grad():
            return call(self.teacher, batch)

    def features(self) -> list[tuple[Tensor, Tensor, Quantizer]]:
        """Return (teacher's feature, student's, quantizer behind it) of each tap, in the order of the names."""
        found = []
        for name in self.names:
            for student, teacher in self.runs(name):
                if not isinstance(student, Tensor) or student.ndim < 3:
                    raise TrainingError(f"tap {name!r} is no feature map [N, C, ...]: tap another module")
                if id(student) not in self._takers:
                    raise TrainingError(
                        f"no layer with an input quantizer takes in what {name!r} returns, so its distortion is "
                        "unknown: tap that layer itself, or a module whose result goes to one as it is"
                    )
                found.append((teacher, student, self._takers[id(student)][1]))
        return found

    def loss(self, alignment: AttentionAlignment) -> Tensor:
        """Return the weighted loss: the mean over taps."""
        each = [alignment.loss(*features) for features in self.features()]
        return alignment.weight * torch.stack(each).mean()

    def gradient_ratio(self, loss: Tensor, task: Tensor) -> float:
        """Return the ``gradient_ratio`` of this loss and the task's at the tapped features."""
        return gradient_ratio(loss, task, [student for _, student, _ in self.features()])


def check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Raise TrainingError, naming the first tensor that differs, unless the student has all the teacher's parameters.

    What quantizers and fusion nodes add to the student is no difference.
    """
    mine = dict(student.named_parameters())
    for name, parameter in teacher.named_parameters():
        if name not in mine:
            raise TrainingError(
                f"teacher of another architecture: its {name!r} {list(parameter.shape)} is not in the student"
                f"{nearest(name, mine)}; the teacher is the float model that the student was made from"
            )
        if mine[name].shape != parameter.shape:
            raise TrainingError(
                f"teacher of another architecture: its {name!r} is {list(parameter.shape)}, the student's "
                f"{list(mine[name].shape)}; the teacher is the float model that the student was made from"
            )
