"""The hook that trains learnable widths to a budget: augmented Lagrangian, projection to whole bits, then they stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewbits.errors import TrainingError
from fewbits.layers import quantized_layers
from fewbits.quantizers import LearnableBits, project
from fewbits.train.hooks import Hook

if TYPE_CHECKING:
    from fewbits.train.state import TrainState


class LearnBits(Hook):
    """Moves the widths of all ``learnable_bits`` quantizers to a mean of ``average_bits`` (FairQuant, 2.6.4 ours).

    To the gradient of each width, nu + rho v times its share of the cost is added, v the mean width less the budget;
    an Adam of its own moves the widths by about ``lr`` bits a step; then nu <- max(0, nu + 0.02 rho v). They take no
    part in the trainer's optimizer and its gradient clipping. From the share ``freeze_at`` of the steps on they are
    whole numbers within the budget, by ``project``, and stay. prices: the cost of one bit of the whole layer, by name,
    for a budget that is not of weights; the mean is then over that cost. Logs bits/average, bits/nu and bits/gap.
    Raises TrainingError for values out of range, and for a model without learnable widths.
    """

    def __init__(
        self,
        average_bits: float,
        *,
        lr: float = 0.02,
        rho: float = 4.0,
        freeze_at: float = 0.6,
        prices: Mapping[str, float] | None = None,
    ) -> None:
        if not average_bits > 0 or not lr > 0 or not rho > 0 or not 0 < freeze_at <= 1:
            raise TrainingError(
                "learnable bits need average_bits, lr and rho above 0 and 0 < freeze_at <= 1, got "
                f"average_bits={average_bits}, lr={lr}, rho={rho}, freeze_at={freeze_at}"
            )
        self.average_bits, self.lr, self.rho, self.freeze_at, self.prices = average_bits, lr, rho, freeze_at, prices
        self.nu = 0.0

    def on_start(self, state: TrainState) -> None:
        """Find the widths and what a bit of each costs."""
        found = learnable(state.model)
        if not found:
            raise TrainingError("this model has no learnable widths: plan weights with quantizer='learnable_bits'")
        self.quantizers = list(found.values())
        lowest = min(q.lowest for q in self.quantizers)
        self.sizes = unit_sizes(state.model, self.prices)
        self.share = torch.cat(self.sizes) / sum(float(s.sum()) for s in self.sizes)
        least = sum(float((s * q.lowest).sum()) for s, q in zip(self.sizes, self.quantizers))
        if self.average_bits * sum(float(s.sum()) for s in self.sizes) < least:
            raise TrainingError(
                f"average_bits={self.average_bits:g} is below the least of the learnable widths, {lowest}"
            )
        self.optimizer = torch.optim.Adam([q.width for q in self.quantizers], lr=self.lr)

    def before_step(self, state: TrainState) -> None:
        """Freeze the widths when their time has come."""
        if state.step >= self.freeze_at * state.total_steps and not all(q.frozen for q in self.quantizers):
            self.freeze()

    def after_backward(self, state: TrainState) -> None:
        """Move the widths."""
        gap = self.average() - self.average_bits
        if not all(q.frozen for q in self.quantizers):
            push = torch.split(self.share * (self.nu + self.rho * gap), [len(s) for s in self.sizes])
            with torch.no_grad():
                for quantizer, extra in zip(self.quantizers, push):
                    width = quantizer.width
                    own = torch.zeros_like(width) if width.grad is None else width.grad
                    width.grad = own + extra.to(own)
                self.optimizer.step()
                for quantizer in self.quantizers:
                    quantizer.width.clamp_(quantizer.lowest, quantizer.highest)
            self.nu = max(0.0, self.nu + 0.02 * self.rho * gap)
        for quantizer in self.quantizers:
            quantizer.width.grad = None  # neither clipped nor moved with the weights
        state.logs.update({"bits/average": self.average(), "bits/nu": self.nu, "bits/gap": gap})

    def average(self) -> float:
        """Return the mean of the real widths, by cost."""
        widths = torch.cat([q.width.detach().cpu().double() for q in self.quantizers])
        return float((widths * self.share.double()).sum())

    def freeze(self) -> None:
        """Project all widths to whole numbers within the budget; they stay from now on."""
        widths = torch.cat([q.width.detach().cpu().double() for q in self.quantizers])
        first = self.quantizers[0]
        whole = project(widths, torch.cat(self.sizes).double(), self.average_bits, first.lowest, first.highest)
        with torch.no_grad():
            for quantizer, part in zip(self.quantizers, torch.split(whole, [len(s) for s in self.sizes])):
                quantizer.width.copy_(part)
                quantizer.frozen = True

    def state_dict(self) -> dict[str, Any]:
        """Return what the hook needs to go on."""
        return {"nu": self.nu, "optimizer": self.optimizer.state_dict(), "given": self._given()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo ``state_dict``. Raises TrainingError where the run that was stopped had other settings."""
        if state["given"] != self._given():
            raise TrainingError(
                f"the run that was stopped had learnable bits {state['given']}, this has {self._given()}"
            )
        self.nu = float(state["nu"])
        self.optimizer.load_state_dict(dict(state["optimizer"]))

    def _given(self) -> dict[str, Any]:
        return {"average_bits": self.average_bits, "lr": self.lr, "rho": self.rho, "freeze_at": self.freeze_at}


def learnable(model: nn.Module) -> dict[str, LearnableBits]:
    """Return the learnable weight quantizers by layer, those that layers share once."""
    found: dict[str, LearnableBits] = {}
    for name, layer in quantized_layers(model).items():
        quantizer = layer.weight_quantizer
        if isinstance(quantizer, LearnableBits) and not any(quantizer is q for q in found.values()):
            found[name] = quantizer
    return found


def unit_sizes(model: nn.Module, prices: Mapping[str, float] | None = None) -> list[Tensor]:
    """Return what one bit of each unit costs, [G] a layer: its weights, or an equal part of the layer's price."""
    sizes = []
    for name, quantizer in learnable(model).items():
        if prices is not None and name not in prices:
            raise TrainingError(f"prices= has none for layer {name!r}, whose widths are learned")
        weight = getattr(model.get_submodule(name), quantized_layers(model)[name].weight_name)
        whole = float(weight.numel()) if prices is None else float(prices[name])
        sizes.append(torch.full((quantizer.groups,), whole / quantizer.groups))
    return sizes
