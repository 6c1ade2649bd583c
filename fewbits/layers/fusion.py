"""Gradient-balanced fusion: a gain on each branch of a concat or an add, then a layer norm over the channels.

"Q2: Quantization-Aware Gradient Balancing and Attention Alignment for Low-Bit Quantization" (arXiv 2511.05898 v2),
eq. 4-10. A closed loop, and not the loss, moves the gains until the branches' gradient energies agree. How nodes come
into a model is in ``balance``; the loop over all nodes, once an optimizer step, in ``fusion_control``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewbits.errors import PlanError, QuantizationError
from fewbits.layers.channel_norm import channel_norm

MODES = ("controller", "fixed", "learned", "off")
ENERGIES = ("rms", "l2")
MEASURES = ("branches", "inputs")


@dataclass(frozen=True)
class FusionSettings:
    """How a node behaves; the paper's symbols in brackets.

    mode: "controller"; "fixed" gains; gains "learned" by the loss (version 1 of the paper); "off": no gains. norm: the
    layer norm (off and no norm: the plain operator, whose energies are still measured). gains: of the branches at the
    start, up to a common factor; None: equal. beta [beta]: weight of a step in the average of energies. eta [eta]:
    rate of the controller; between beta / 4, where the loop is critically damped, and beta / 2. tau [tau]: wanted log
    energy of each branch against their mean, zero in sum; None: equal. energy: "l2" norm of the gradient, or "rms",
    that norm over the square root of the values a sample: equal for branches of equal width, and fair to unequal ones.
    limit: of |lambda|. norm_eps: within the root of the norm. measure: gradients at the "branches" of the cat or add,
    or at the "inputs" of the module in whose forward it is: of a gated add, the tensors before the gate. Raises
    PlanError for a value out of range.
    """

    mode: str = "controller"
    norm: bool = True
    gains: tuple[float, ...] | None = None
    beta: float = 0.1
    eta: float = 0.025
    tau: tuple[float, ...] | None = None
    energy: str = "rms"
    limit: float = 1.5
    norm_eps: float = 1e-5
    measure: str = "branches"

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("energy", ENERGIES), ("measure", MEASURES)):
            if getattr(self, name) not in known:
                raise PlanError(f"{name} of a fusion must be one of {known}, got {getattr(self, name)!r}")
        if not 0 < self.beta <= 1 or any(not 0 < v < math.inf for v in (self.eta, self.limit, self.norm_eps)):
            raise PlanError(
                "a fusion needs 0 < beta <= 1, and eta, limit and norm_eps above 0 and finite, got "
                f"beta={self.beta}, eta={self.eta}, limit={self.limit}, norm_eps={self.norm_eps}"
            )
        for name in ("gains", "tau"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(float(v) for v in value))
        if self.gains is not None and (self.mode == "off" or any(not 0 < g < math.inf for g in self.gains)):
            raise PlanError(f"gains={self.gains} with mode={self.mode!r}: give positive numbers, none if 'off'")
        if self.tau is not None and (self.mode != "controller" or not abs(sum(self.tau)) <= 1e-6):
            raise PlanError(f"tau={self.tau} with mode={self.mode!r}: it is for the controller, and sums to zero")


class BalancedFusion(nn.Module):
    """Fuses K tensors: h = cat(a_1 F_1, .., a_K F_K) or their sum, a = softmax(lambda); then (h - mean) / std, eq. 5-6.

    F_i [N, C_i, ...] (or channels on another ``axis``); mean and std over the channels, for each sample and place, in
    float32. Buffers in float32: lam [K] (a parameter in mode "learned"), energy [K] (averaged; NaN before the first
    step), and mu and sigma, the constants that stand for mean and std where ``constant`` is True.
    branches: their names, for logs. label: the name of this node, for errors.
    """

    is_quantizer: ClassVar[bool] = True  # trainers put learned gains into the group without weight decay
    lam: Tensor
    energy: Tensor
    mu: Tensor
    sigma: Tensor

    def __init__(
        self,
        branches: int | Sequence[str],
        settings: FusionSettings | None = None,
        *,
        op: str = "cat",
        axis: int = 1,
        label: str = "fusion",
    ) -> None:
        super().__init__()
        names = [f"branch{i}" for i in range(branches)] if isinstance(branches, int) else list(branches)
        self.branches, self.op, self.axis, self.label = tuple(names), op, axis, label
        self.settings = settings = settings or FusionSettings()
        count = len(names)
        if count < 2:
            raise PlanError(f"{label}: a fusion needs two branches or more, got {count}: there is nothing to balance")
        if op not in ("cat", "add"):
            raise PlanError(f"{label}: op must be 'cat' or 'add', got {op!r}")
        for what, given in (("gains", settings.gains), ("tau", settings.tau)):
            if given is not None and len(given) != count:
                raise PlanError(f"{label}: {what} has {len(given)} numbers, the node {count} branches {self.branches}")
        lam = torch.tensor([1.0] * count if settings.gains is None else settings.gains).log()
        self._hold("lam", lam - lam.mean(), settings.mode == "learned")
        self.register_buffer("energy", torch.full((count,), torch.nan))
        self.register_buffer("mu", torch.zeros(()))
        self.register_buffer("sigma", torch.ones(()))
        self.frozen, self.constant, self.clamped = False, False, 0  # clamped: steps at which lambda met its limit
        self.watching = True  # measure gradients in training
        self.owned = False  # by a module that watches its inputs (``balance``)
        self._squares: list[Tensor | None] = [None] * count  # of the gradients since the last update
        self._sizes = [1.0] * count  # values a sample

    def _hold(self, name: str, value: Tensor, learned: bool) -> None:
        if learned:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @property
    def gains(self) -> Tensor:
        """The gains a = softmax(lambda), [K], detached unless they are learned; ones where off."""
        if self.settings.mode == "off":
            return torch.ones_like(self.lam)
        return torch.softmax(self.lam if self.settings.mode == "learned" else self.lam.detach(), 0)

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the fused tensor, in the dtype of the plain operator. Raises QuantizationError for shapes unfit."""
        tensors = self._checked(tensors)
        if self.settings.measure == "inputs" and not self.owned:
            raise QuantizationError(
                f"{self.label}: measure='inputs' is for nodes that balance_fusion puts into a module; this one knows "
                "no inputs but its branches: use measure='branches'"
            )
        h = self.fuse(self.watched(tensors) if self.settings.measure == "branches" else tensors)
        if not self.settings.norm:
            return h
        wide = h.float() if h.dtype in (torch.float16, torch.bfloat16) else h
        if self.constant:
            return ((wide - self.mu) / self.sigma).to(h.dtype)
        if self.training:
            return channel_norm(wide, self.axis, self.settings.norm_eps).to(h.dtype)
        mean, std = self.statistics(wide)
        return ((wide - mean) / std).to(h.dtype)

    def fuse(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the tensors with their gains, concatenated or summed: what the norm gets."""
        if self.settings.mode != "off":
            tensors = [x * a.to(x.dtype) for x, a in zip(tensors, self.gains)]
        if self.op == "cat":
            return torch.cat(list(tensors), self.axis)
        total = tensors[0]
        for x in tensors[1:]:
            total = total + x
        return total

    def statistics(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std over the channels of h, one channel each."""
        variance, mean = torch.var_mean(h, self.axis, unbiased=False, keepdim=True)
        return mean, (variance + self.settings.norm_eps).sqrt()

    def _checked(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if len(tensors) != len(self.branches):
            raise QuantizationError(f"{self.label}: got {len(tensors)} tensors for the branches {self.branches}")
        shapes = [list(x.shape) for x in tensors]
        others = [s[: self.axis] + s[self.axis :][1:] if self.op == "cat" else s for s in shapes]
        if any(s != others[0] for s in others):
            raise QuantizationError(
                f"{self.label}: branches of shapes {shapes} cannot be balanced: they must agree in "
                f"{f'all axes but {self.axis}' if self.op == 'cat' else 'every axis'}; resize them before, or leave "
                "this node out"
            )
        return tensors

    def watched(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return views whose gradients are noted: those through this node only, also where a tensor has other uses."""
        if not (self.training and self.watching and torch.is_grad_enabled()):
            return list(tensors)
        views = []
        for i, x in enumerate(tensors):
            # an image, or what a frozen layer made, has no gradient of its own: taken as zero, its gain would run away
            view = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            self._sizes[i] = x.numel() / max(len(x), 1)
            view.register_hook(functools.partial(self._note, i))  # type: ignore[no-untyped-call]
            views.append(view)
        return views

    def _note(self, i: int, grad: Tensor) -> None:
        square = grad.detach().float().square().sum()
        seen = self._squares[i]
        self._squares[i] = square if seen is None else seen + square

    def take_squares(self) -> Tensor:
        """Return the sum of squared gradients of each branch since the last call, [K], and start anew."""
        squares = [torch.zeros_like(self.energy[0]) if s is None else s.to(self.energy) for s in self._squares]
        self._squares = [None] * len(self.branches)
        sizes = torch.tensor(self._sizes, device=self.energy.device) if self.settings.energy == "rms" else 1.0
        return torch.stack(squares) / sizes

    @torch.no_grad()
    def update(self, squares: Tensor) -> None:
        """Take the squared energies of one optimizer step, [K], into the average, and move the gains: eq. 8-10.

        Energies of which one is not finite, or all are zero, change nothing. A common factor of all energies, such as a
        loss scale, moves every log energy alike, and the error not at all.
        """
        now = squares.to(self.energy).sqrt()
        if not bool(torch.isfinite(now).all()) or not bool(now.any()):
            return
        given = self.settings
        first = bool(torch.isnan(self.energy).any())
        self.energy.copy_(now if first else (1 - given.beta) * self.energy + given.beta * now)
        if given.mode != "controller" or self.frozen:
            return
        error = self.log_energies()
        error = error - error.mean() - (0.0 if given.tau is None else torch.tensor(given.tau, device=error.device))
        self.lam.sub_(given.eta * error)
        self.lam.sub_(self.lam.mean())  # which changes no gain
        self.clamped += int((self.lam.abs() > given.limit).any())
        self.lam.clamp_(-given.limit, given.limit)

    def log_energies(self) -> Tensor:
        """Return log of the averaged energies, [K]; NaN before the first step."""
        return (self.energy + 1e-12).log()

    def log_ratio(self) -> float:
        """Return log energy of the first (or of the "deep") branch less that of the other; NaN before the first step.

        Of more than two branches, return the largest difference.
        """
        logs = self.log_energies()
        if self.branches == ("shallow", "deep"):
            logs = logs.flip(0)
        return float(logs[0] - logs[1] if len(logs) == 2 else logs.max() - logs.min())

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside tensors."""
        return {"frozen": self.frozen, "constant": self.constant, "clamped": self.clamped}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Undo ``get_extra_state``."""
        self.frozen, self.constant = bool(state["frozen"]), bool(state["constant"])
        self.clamped = int(state["clamped"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint of the plain model has no state of ours: accept it, and keep what we have."""
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_squares": [None] * len(self.branches)}  # parts of a step, and no state

    def extra_repr(self) -> str:
        """Show op, branches and mode in ``print(model)``."""
        return (
            f"{self.op} of {', '.join(self.branches)}; {self.settings.mode}{'' if self.settings.norm else ', no norm'}"
        )


def fusion_nodes(model: nn.Module) -> dict[str, BalancedFusion]:
    """Return the balanced nodes of a model by name, such as ``neck.up1.cat0``, in the order of the modules."""

    def named() -> Iterator[tuple[str, BalancedFusion]]:
        for name, module in model.named_modules():
            if isinstance(module, BalancedFusion):
                yield (
                    name.replace("fusions.", "", 1) if name.startswith("fusions.") else name.replace(".fusions.", "."),
                    module,
                )

    return dict(named())
