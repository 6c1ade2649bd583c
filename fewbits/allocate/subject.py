"""The model that a search works on: quantized by the present plan, trained and measured by the caller's functions."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fewbits.allocate.layout import Layout
from fewbits.errors import SearchError
from fewbits.layers import calibrate, quantize
from fewbits.layers.base import activation_quantizers
from fewbits.layers.swap import call, in_eval, output_only, quantizable, quantized_layers, supported
from fewbits.plan import LayerPlan, Plan

Finetune = Callable[[nn.Module, int], Any]
Evaluate = Callable[[nn.Module], float]
Snapshot = dict[str, Any]


class Subject:
    """A copy of the float model with the plan of the present bits.

    finetune: trains the model in place for so many epochs. evaluate: returns its accuracy in percent. calibration:
    batches of model inputs that set ranges and norms before each training.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, finetune: Finetune, evaluate: Evaluate, calibration: Sequence[Any]
    ) -> None:
        self.model, self.layout = copy.deepcopy(model), layout
        self.finetune, self.evaluate, self.calibration = finetune, evaluate, list(calibration)
        if not self.calibration:
            raise SearchError("a search needs calibration= batches of model inputs, got none")
        self._plans: dict[str, LayerPlan | None] = {}
        self.where = "float"  # of the search, for errors

    def apply(self, bits: Sequence[int]) -> None:
        """Quantize by the plan of these bits. Layers whose plan stays keep their quantizers, and all their weights."""
        layers = quantizable(self.model) | output_only(self.model)
        decided = self.layout.plan(bits).resolve(
            quantizable(self.model), output_only(self.model), lambda name, given: supported(layers[name], given)
        )
        changed = {name: plan for name, plan in decided.items() if self._plans.get(name, LayerPlan()) != plan}
        if changed:
            quantize(self.model, Plan(tuple(changed.items())), verbose=False)
        self._plans = dict(decided)

    def refresh(self) -> None:
        """Set the ranges of activations, then the statistics of batch norms, from the calibration batches.

        Raises SearchError, saying where the search was, for batches that the model does not take.
        """
        with self._told("calibration"):
            if any(activation_quantizers(layer) for layer in quantized_layers(self.model).values()):
                calibrate(self.model, self.calibration)
            refresh_norms(self.model, self.calibration)

    def cycle(
        self, epochs: int, every: int, *, goal: float | None = None, patience: int | None = None
    ) -> tuple[float, int]:
        """Train for at most ``epochs`` and return (best accuracy, epochs done); the weights are those of the best.

        every: epochs from one measurement to the next. goal, patience: stop at this accuracy, or after so many
        measurements without a gain.
        """
        if epochs == 0:
            return self.measure(), 0
        best, kept, done, idle = -math.inf, None, 0, 0
        while done < epochs:
            part = min(every, epochs - done)
            self.train(part)
            done, accuracy = done + part, self.measure()
            idle = 0 if accuracy > best else idle + 1
            last = done >= epochs or (goal is not None and accuracy >= goal) or idle == patience
            if accuracy > best:
                best, kept = accuracy, None if last else self.snapshot()
            if last:
                break
        if kept is not None:
            self.model.load_state_dict(kept)
        return best, done

    def train(self, epochs: int) -> None:
        """Call ``finetune``. Raises SearchError, saying where the search was, for what it raises."""
        self.model.train()
        with self._told("finetune"):
            self.finetune(self.model, epochs)
        self.model.zero_grad(set_to_none=True)

    def measure(self) -> float:
        """Call ``evaluate``. Raises SearchError, saying where the search was, for what it raises and for NaN."""
        self.model.eval()
        with self._told("evaluate"), torch.no_grad():
            accuracy = float(self.evaluate(self.model))
        if not math.isfinite(accuracy):
            raise SearchError(
                f"evaluate returned {accuracy} at step {self.where} of the search; expected an accuracy in percent: "
                "look for NaN in the model's outputs, or lower the learning rate of finetune"
            )
        return accuracy

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise SearchError(
                f"{name} raised {type(error).__name__} at step {self.where} of the search: {error}"
            ) from error

    def snapshot(self) -> Snapshot:
        """Return all weights, statistics and quantizer states, copied to the CPU."""
        return {
            name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in self.model.state_dict().items()
        }

    def restore(self, bits: Sequence[int], snapshot: Snapshot) -> None:
        """Put the model back to what it was at a snapshot with these bits, to the bit."""
        self.apply(bits)
        self.model.load_state_dict(snapshot)


def refresh_norms(model: nn.Module, batches: Sequence[Any]) -> None:
    """Replace the running statistics of batch norms by their plain average over the batches."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with in_eval(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True  # None: cumulative
        for batch in batches:
            call(model, batch)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
