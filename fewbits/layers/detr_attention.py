"""Twins of attention of DETR-like detectors that is not softmax(Q K^T) V: deformable, and in two directions at once.

As in ``intercept``, the float ``forward`` of the transformers library runs unchanged, and the few calls that matter are
replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewbits.errors import QuantizationError
from fewbits.layers.attention import AttentionLayer
from fewbits.layers.base import quantizes
from fewbits.layers.intercept import WeightlessLayer
from fewbits.plan import TensorPlan
from fewbits.quantizers import Quantizer, recomputed


class DetrAttentionTwin(WeightlessLayer, AttentionLayer):
    """Runs the float forward under a mode that quantizes the operands."""

    def make_mode(self) -> DeformableMode | TwoWayMode:
        """Return the mode of one forward."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the float forward returns."""
        if not self.has_operands:
            return super().forward(*args, **kwargs)
        mode = self.make_mode()
        with mode:
            out = super().forward(*args, **kwargs)
        if not mode.done:
            raise QuantizationError(
                f"{self.float_class.__name__} computed its attention in another way than the transformers library does "
                "in PyTorch, such as by a kernel of its own, so its operands cannot be quantized: drop 'operands' from "
                "its plan, or set disable_custom_kernels in the model's configuration"
            )
        return out


class DeformableMode(TorchFunctionMode):
    """Quantizes both factors of the weighted sum of sampled values: the product behind ``grid_sample``."""

    def __init__(self, layer: AttentionLayer) -> None:
        super().__init__()
        self.layer, self.sampled, self.done = layer, False, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call func, or the product on quantized factors."""
        if func in (torch.mul, Tensor.mul) and self.sampled and not self.done:
            self.done = True
            return self.product(*args)
        self.sampled |= func is F.grid_sample
        return func(*args, **kwargs or {})

    def product(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return values [B H, D, Q, points] times weights [B H, 1, Q, points], as operands [B, Q, H, ., .]."""
        heads = self.layer.head_count()
        value = torch.unflatten(values, 0, (-1, heads)).permute(0, 3, 1, 4, 2)  # [B, Q, H, points, D]
        weight = torch.unflatten(weights, 0, (-1, heads)).permute(0, 3, 1, 2, 4)  # [B, Q, H, 1, points]
        value, weight = self.layer.operand("value", value), self.layer.operand("probability", weight)
        with recomputed(value, weight):
            return value.permute(0, 2, 4, 1, 3).flatten(0, 1) * weight.permute(0, 2, 3, 1, 4).flatten(0, 1)


@quantizes(
    "transformers.models.omdet_turbo.modeling_omdet_turbo.OmDetTurboMultiscaleDeformableAttention",
    "transformers.models.grounding_dino.modeling_grounding_dino.GroundingDinoMultiscaleDeformableAttention",
    "transformers.models.mm_grounding_dino.modeling_mm_grounding_dino.MMGroundingDinoMultiscaleDeformableAttention",
)
class DeformableTwin(DetrAttentionTwin):
    """Multi-scale deformable attention: probability [.., H, 1, points] times the values sampled, [.., H, points, D].

    "Deformable DETR" (Zhu et al. 2021, arXiv 2010.04159), eq. 3. Projections are layers of their own; interpolation
    between cells is in float.
    """

    operand_axes: ClassVar[Mapping[str, int]] = {"probability": -1, "value": -2}

    def make_mode(self) -> DeformableMode:
        """Return the mode of one forward."""
        return DeformableMode(self)


class TwoWayMode(TorchFunctionMode):
    """Quantizes the operands of the three products: scores, what the image reads, what the text reads."""

    def __init__(self, layer: AttentionLayer) -> None:
        super().__init__()
        self.layer, self.products, self.softmaxes = layer, 0, 0

    @property
    def done(self) -> bool:
        """Tell whether all products were seen."""
        return (self.products, self.softmaxes) == (3, 2)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call func, or its replacement."""
        if func is torch.bmm:
            return self.product(*args)
        out = func(*args, **kwargs or {})
        if func is Tensor.softmax:
            self.softmaxes += 1
            return self.operand("text_probability" if self.softmaxes == 1 else "probability", out)
        return out

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product of [B H, n, k] and [B H, k, m]; probabilities were quantized behind the softmax."""
        self.products += 1
        if self.products == 1:
            a, b = self.operand("query", a), self.operand("key", b)
        else:
            b = self.operand("value" if self.products == 2 else "text_value", b)
        with recomputed(a, b):
            return torch.bmm(a, b)

    def operand(self, name: str, x: Tensor) -> Tensor:
        """Quantize [B H, n, m] with the heads on an axis of their own."""
        return self.layer.operand(name, torch.unflatten(x, 0, (-1, self.layer.head_count()))).flatten(0, 1)


@quantizes(
    "transformers.models.grounding_dino.modeling_grounding_dino.GroundingDinoBiMultiHeadAttention",
    "transformers.models.mm_grounding_dino.modeling_mm_grounding_dino.MMGroundingDinoBiMultiHeadAttention",
)
class TwoWayTwin(DetrAttentionTwin):
    """Attention from image to text and from text to image by the same scores; see ``AttentionLayer`` for operands.

    query: of the image; key and value: of the text; text_probability and text_value: of the text that reads the image.
    """

    operand_axes: ClassVar[Mapping[str, int]] = {
        **{"query": -1, "key": -2, "probability": -1, "value": -2},
        **{"text_probability": -1, "text_value": -2},
    }

    def make_mode(self) -> TwoWayMode:
        """Return the mode of one forward."""
        return TwoWayMode(self)

    def make_operand_quantizer(self, name: str, plan: TensorPlan | None) -> Quantizer | None:
        """Build the quantizer of one operand; the probabilities of both directions are affine."""
        if plan is not None and name == "text_probability":
            plan = dataclasses.replace(plan, symmetric=False)
        return super().make_operand_quantizer(name, plan)
