"""What a run needs of a task: its data, model, loss and metrics. One class a task; ``tasks`` lists them."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor, nn

from fewbits.recipes.schema import Recipe
from fewbits.train.loop import Loss
from fewbits.train.staging import StageLoss

Pair = tuple[Tensor, Tensor]
Answer = Callable[[Tensor], Tensor]
SENSITIVITY_EXAMPLES = 256  # that a sensitivity is measured on, in batches of SENSITIVITY_BATCH
SENSITIVITY_BATCH = 32


class Examples(Protocol):
    """A data set, for training (``gather`` with a generator augments) and in order."""

    def __len__(self) -> int: ...

    def gather(self, indices: Any, generator: Any = None) -> Pair: ...

    def batches(self, batch_size: int) -> Iterator[Pair]: ...


E = TypeVar("E", bound=Examples)


@dataclass(frozen=True)
class Task(abc.ABC, Generic[E]):
    """A task with its data.

    train: what is trained on. validation: held out of it, None if nothing is. test: for final numbers only. notes:
    what a reader of the results must know of them.
    headline: the metric that is told first. accuracy: the one that a floor of the accuracy means, in percent. shown:
    inputs on which output errors are measured. classes: names of what is told apart, where there are some.
    forms: of the model, that ``pictures`` is given: float, calibrated, quantized. terms: names of distillation terms
    that a stage of a curriculum may have.
    """

    headline: ClassVar[str]
    accuracy: ClassVar[str]
    shown: ClassVar[int]
    forms: ClassVar[tuple[str, ...]] = ("float", "quantized")
    terms: ClassVar[tuple[str, ...]] = ()

    train: E
    validation: E | None
    test: E
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """See the class."""
        return ()

    def sample(self, count: int) -> Tensor:
        """Return the first ``count`` training inputs, not augmented: [count, ...]."""
        return self.train.gather(range(min(count, len(self.train))))[0]

    @abc.abstractmethod
    def build(self, recipe: Recipe) -> tuple[nn.Module, tuple[str, ...]]:
        """Build the float model, seeded, with its weights; return it and what a reader must know of it."""

    @abc.abstractmethod
    def loss(self, label_smoothing: float = 0.0) -> Loss:
        """Return what is trained on: (model, batch) -> scalar."""

    @abc.abstractmethod
    def answers(self, model: Answer, examples: E, batch_size: int) -> Iterator[Pair]:
        """Yield (outputs, right answers) of all examples in order, on the CPU, of a module or any callable."""

    @abc.abstractmethod
    def score(self, pairs: Iterable[Pair], examples: E) -> dict[str, Any]:
        """Return the metrics of what ``answers`` yields for ``examples``."""

    @abc.abstractmethod
    def some(self, count: int, batch_size: int, seed: int) -> Iterator[Pair]:
        """Iterate over batches of a representative choice of the training examples."""

    def agreement(self, got: Tensor, want: Tensor) -> Tensor:
        """Tell for each answer of a batch whether two outputs agree, bool [answers]: here, scores on the last axis."""
        return (got.argmax(-1) == want.argmax(-1)).flatten()

    def pictures(self, forms: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
        """Return test examples with what each form of the model makes of them, as the report shows them."""
        return []

    def stage_loss(self, student: nn.Module, teacher: nn.Module) -> StageLoss | None:
        """Return what the stages of a curriculum train on beside a frozen teacher, the float model; None: the loss."""
        return None

    def deployed(self, model: nn.Module) -> nn.Module:
        """Return the form of a model that is exported, made of it in place: here, itself."""
        return model

    def about(self, recipe: Recipe) -> dict[str, Any]:
        """Return what the packed file tells beside the weights, as JSON has it."""
        return {}

    def evaluate(self, model: Answer, examples: E, batch_size: int) -> dict[str, Any]:
        """Return the metrics of a model, or of any callable from inputs to outputs."""
        return self.score(self.answers(model, examples, batch_size), examples)

    def calibration(self, recipe: Recipe) -> list[Tensor]:
        """Return the inputs that set the ranges of activations."""
        count = recipe.evaluate.calibration_examples
        return [inputs for inputs, _ in self.some(count, count, recipe.seed)]

    def sensitivity(self, recipe: Recipe) -> Iterator[Pair]:
        """Iterate over the batches that a sensitivity is measured on."""
        return self.some(SENSITIVITY_EXAMPLES, SENSITIVITY_BATCH, recipe.seed)
