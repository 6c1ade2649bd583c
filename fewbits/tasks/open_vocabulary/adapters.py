"""Open-vocabulary detectors of the transformers library, as the losses, the curriculum and the policy take them.

A detector of the library is wrapped, not rewritten: parameters keep their names behind ``model.``. One file a family:
``omdet``, ``grounding``, ``owl``.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewbits.errors import PlanError
from fewbits.layers import float_class, quantizable
from fewbits.plan import LayerPlan, Plan
from fewbits.tasks.open_vocabulary.detr_loss import detr_loss
from fewbits.tasks.open_vocabulary.policy import decided_from, w_a_att
from fewbits.tasks.open_vocabulary.queries import Queries


@dataclass(frozen=True)
class Anatomy:
    """Names of submodules of a detector, or of parameters that no submodule has; a glob is of layers.

    backbone, neck, head: its functional modules, in the order of the data. text: never quantized and never trained.
    floats: layers that stay in float, beside the first convolution.
    """

    backbone: tuple[str, ...]
    neck: tuple[str, ...]
    head: tuple[str, ...]
    text: tuple[str, ...]
    floats: tuple[str, ...]


class LibraryDetector(nn.Module):
    """Base of the wrappers. anatomy: of the class; pairing: how its queries are paired by default.

    model: the library's detector, whose text modules are frozen here.
    """

    anatomy: ClassVar[Anatomy]
    pairing: ClassVar[str] = "rank"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        for name in self.anatomy.text:
            self.get_submodule(name).requires_grad_(False)

    def train(self, mode: bool = True) -> LibraryDetector:
        """Set the mode of all but the texts, which stay in eval mode: what is frozen drops nothing out."""
        super().train(mode)
        for name in self.anatomy.text:
            self.get_submodule(name).eval()
        return self

    def functional_modules(self) -> dict[str, tuple[str, ...]]:
        """Return the names of "backbone", "neck" and "head", without those that this detector lacks: what the stages of
        a curriculum name. The texts, which are frozen, need no stage."""
        parts = {"backbone": self.anatomy.backbone, "neck": self.anatomy.neck, "head": self.anatomy.head}
        known = {name for name, _ in [*self.named_modules(), *self.named_parameters()]}
        kept = {part: tuple(name for name in names if name in known) for part, names in parts.items()}
        return {part: names for part, names in kept.items() if names}

    def float_layers(self) -> tuple[str, ...]:
        """Return names or globs of layers of the functional modules that stay in float: the last ones."""
        return self.anatomy.floats

    def backbone_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the backbone's maps [B, C, ...]; nothing behind it runs."""
        raise NotImplementedError

    def predict(self, images: Tensor) -> Queries:
        """Return the answer to normalised images [B, 3, H, W] for the texts that the wrapper was made with."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Return [B, Q, 4 + T]: corners in pixels, and scores 0..1 of the texts."""
        found = self.predict(images)
        return torch.cat([found.boxes, found.logits.sigmoid()], -1)

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Queries]:
        """Return the task loss, a scalar, and the answer. targets: [B, M, 5]; see ``detr_loss``."""
        found = self.predict(images)
        return detr_loss(found, targets), found


def library_policy(
    detector: LibraryDetector, weight: int = 4, act: int = 4, attention: int = 8, act_granularity: str = "tensor"
) -> Plan:
    """Return the plan W-A-Att of a wrapped detector: every convolution and linear layer of its functional modules.

    Weights are symmetric per output channel, inputs affine per ``act_granularity``, the operands of attention affine
    per head. In float stay the text encoder, the first convolution, the last layers of the heads, and embedding tables.
    Raises PlanError for a detector that has nothing to quantize.
    """
    full = w_a_att(weight, act, attention, act_granularity)
    with_weight, attending = LayerPlan(full.weight, full.input), LayerPlan(operands=full.operands)
    rules: list[tuple[str, LayerPlan | None]] = []
    for name, layer in chosen_layers(detector).items():
        rules.append((name, with_weight if hasattr(layer, "weight") else attending))
    if not rules:
        raise PlanError(f"{type(detector.model).__name__} has no layer that could be quantized")
    return Plan(tuple(rules), decided_from(weight, act, attention))


def chosen_layers(detector: LibraryDetector) -> dict[str, nn.Module]:
    """Return the layers that the policy quantizes, by name."""
    parts = [name for names in detector.functional_modules().values() for name in names]
    inside = {n: m for n, m in quantizable(detector).items() if any(n == p or n.startswith(f"{p}.") for p in parts)}
    layers = {n: m for n, m in inside.items() if not issubclass(float_class(m), nn.Embedding)}
    first = next((n for n, m in layers.items() if issubclass(float_class(m), nn.Conv2d)), None)
    floats = (*detector.float_layers(), *([first] if first else []))
    return {n: m for n, m in layers.items() if not any(fnmatch.fnmatchcase(n, pattern) for pattern in floats)}
