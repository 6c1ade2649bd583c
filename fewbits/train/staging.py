"""The stages of a run: what ``fit`` asks about them, of a plain run (one stage) and of one with a curriculum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fewbits.errors import TrainingError
from fewbits.layers import QuantizedLayer, calibrate, quantized_layers
from fewbits.plan import LayerPlan
from fewbits.quantizers import Quantizer
from fewbits.train.curriculum import NEVER, Curriculum, Stage

Loss = Callable[[nn.Module, Any], Tensor]
StageLoss = Callable[[Stage, Loss], Loss]


class OneStage:
    """A run of one stage, in which all is trained from the start."""

    ends: list[int]
    """The step at which each stage ends."""
    losses: list[Loss]
    """The loss of each stage."""

    def start(self, model: nn.Module, total: int, task: Loss) -> None:
        """Get to know the model, the number of steps, and the loss that ``fit`` was given."""
        self.model, self.ends, self.losses = model, [total], [task]

    def name(self, part: int, run: str) -> str:
        """Return what hooks are told of stage ``part``; run: the name of the run."""
        return run

    def enter(self, part: int) -> None:
        """Bring the model into stage ``part``."""
        self.model.train()

    def calibrate(self, part: int, to_device: Callable[[Any], Any]) -> None:
        """Set the ranges of what is quantized from stage ``part`` on."""

    def renewed(self, part: int) -> list[str]:
        """Return the names of parameters that begin anew with stage ``part``."""
        return []

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with this one."""
        return {}

    def leave(self) -> None:
        """Give the model back, as far as stages changed it."""


class Staged(OneStage):
    """A curriculum, with what it needs in a run: give it to ``fit``.

    calibration: batches of model inputs (as for ``fewbits.calibrate``), the same on every process and when resumed;
    they set the ranges of what each stage adds, with all that was added before quantized. loss: (stage, the loss that
    ``fit`` was given) -> the loss of that stage; None: the same in all. Layers that are not reached yet run in float,
    and all of their parameters and batch norms stay as they are; their dropout is as in training. What modules share
    belongs to the earliest of their stages. After the run the model has its modes and ``requires_grad`` back.
    Raises TrainingError for no calibration batches, and as ``Curriculum.check`` when the run begins.
    """

    def __init__(self, curriculum: Curriculum, calibration: Sequence[Any], loss: StageLoss | None = None) -> None:
        self.curriculum, self.calibration, self.loss_of = curriculum, list(calibration), loss
        if not self.calibration:
            raise TrainingError("a curriculum needs batches that calibrate what each stage adds, got none")

    def start(self, model: nn.Module, total: int, task: Loss) -> None:
        """See the base. Raises TrainingError where model, steps and curriculum do not fit."""
        ends = self.curriculum.ends(total)
        self.curriculum.check(model)
        names = {id(layer): name for name, layer in quantized_layers(model).items()}
        if not names:
            raise TrainingError("a curriculum is for a quantized model, this one has no quantized layer: quantize it")
        self.places = self._places(model)
        self.parameters = {p: self.places[id(p)] for p in model.parameters() if p.requires_grad}
        self.layers = {names[id(m)]: (m, self.places[id(m)]) for m in model.modules() if isinstance(m, QuantizedLayer)}
        self.modes = {layer: layer.mode for layer, _ in self.layers.values()}
        self.losses = [self._loss(stage, task) for stage in self.curriculum.stages]
        self.model, self.ends = model, ends

    def _loss(self, stage: Stage, task: Loss) -> Loss:
        if self.loss_of is not None:
            return self.loss_of(stage, task)
        if stage.distill:
            raise TrainingError(f"a stage names the terms {list(stage.distill)}: give Staged a loss= that has them")
        return task

    def _places(self, model: nn.Module) -> dict[int, int]:
        """Return the stage of every module and parameter, by id."""
        found: dict[int, int] = {}
        named: list[tuple[str, Any]] = [*model.named_modules(remove_duplicate=False)]
        named += model.named_parameters(remove_duplicate=False)
        for name, thing in named:
            place = self.curriculum.place(name)  # None: a container of modules in different stages
            found[id(thing)] = min(found.get(id(thing), NEVER), NEVER if place is None else place)
        return found

    def name(self, part: int, run: str) -> str:
        """See the base."""
        return self.curriculum.stages[part].name

    def enter(self, part: int) -> None:
        """Train what is reached, quantized; freeze the rest in float."""
        self.model.train()
        for parameter, place in self.parameters.items():
            parameter.requires_grad_(place <= part)
        for layer, place in self.layers.values():
            layer.mode = "quantize" if place <= part else "float"
        for module in self.model.modules():
            if isinstance(module, _NormBase) and (self.places[id(module)] > part or self.curriculum.norms == "frozen"):
                module.eval()

    def calibrate(self, part: int, to_device: Callable[[Any], Any]) -> None:
        """See the base."""
        new = [n for n, (layer, place) in self.layers.items() if place == part and layer.layer_plan != LayerPlan()]
        if new:
            calibrate(self.model, (to_device(batch) for batch in self.calibration), only=new)

    def renewed(self, part: int) -> list[str]:
        """Return the parameters of the quantizers that begin with this stage."""
        owners = [(n, m) for n, m in self.model.named_modules() if isinstance(m, Quantizer)]
        return [f"{n}.{p}" for n, m in owners if self.places[id(m)] == part for p, _ in m.named_parameters()]

    def identity(self) -> dict[str, Any]:
        """See the base."""
        return {"curriculum": self.curriculum.identity()}

    def leave(self) -> None:
        """See the base."""
        if not hasattr(self, "model"):
            return
        for layer, mode in self.modes.items():
            layer.mode = mode
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.model.train()
