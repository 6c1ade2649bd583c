"""Attention whose two matmuls take quantized operands, and the twin of ``nn.MultiheadAttention``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import PlanError, QuantizationError
from fewbits.layers.base import QuantizedLayer, quantizes
from fewbits.plan import LayerPlan, TensorPlan
from fewbits.quantizers import Quantizer, make_quantizer, recomputed

OPERANDS = {"query": -1, "key": -2, "probability": -1, "value": -2}  # and the axis that the matmul sums over
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "heads")


class AttentionLayer(QuantizedLayer):
    """Mixin of twins with the matmuls ``softmax(Q K^T) V``, whose operands follow ``LayerPlan.operands``.

    Operands: query [.., H, L, D], key as K^T [.., H, D, S], probability [.., H, L, S] and value [.., H, S, D];
    granularity "head" has one scale for each of the H heads. Probabilities are never negative, so theirs is always
    an affine quantizer, whatever the plan says of symmetry; its zero point is 0.
    """

    quantizes_operands: ClassVar[bool] = True
    operand_axes: ClassVar[Mapping[str, int]] = OPERANDS  # of another product than softmax(Q K^T) V: its own

    query_quantizer: Quantizer | None
    key_quantizer: Quantizer | None
    probability_quantizer: Quantizer | None
    value_quantizer: Quantizer | None

    def attach(self, plan: LayerPlan, weight_quantizer: Quantizer | None) -> None:
        """Add the quantizers of weight and input (base class) and of the operands."""
        operands = {name: self.make_operand_quantizer(name, plan.operands) for name in self.operand_axes}
        super().attach(plan, weight_quantizer)
        for name, quantizer in operands.items():
            setattr(self, f"{name}_quantizer", quantizer)

    def check(self, plan: LayerPlan) -> None:
        """Accept operands, refuse an output: that is the business of the projection behind the matmuls."""
        if plan.output is not None:
            raise QuantizationError(
                f"the result of a {self.float_class.__name__} is that of its output projection: "
                "move 'output' to the plan of that child layer"
            )

    def make_operand_quantizer(self, name: str, plan: TensorPlan | None) -> Quantizer | None:
        """Build the quantizer of one operand."""
        if plan is None:
            return None
        channels = self.head_count() if plan.granularity in ("head", "channel") else 1
        try:
            plan = dataclasses.replace(plan, symmetric=False) if name == "probability" else plan
            quantizer = make_quantizer(plan, channels=channels, axis=-3, contraction=self.operand_axes[name])
        except PlanError as error:
            raise PlanError(f"operand {name!r} (probabilities are always affine): {error}") from error
        return self._to_device(quantizer)

    def head_count(self) -> int:
        """Return the number of query heads."""
        for holder in (self, getattr(self, "config", None)):
            for name in HEAD_COUNTS:
                if isinstance(getattr(holder, name, None), int):
                    return int(getattr(holder, name))
        raise QuantizationError(
            f"{self.float_class.__name__} has none of the attributes {HEAD_COUNTS} that tell its number of heads: "
            'use granularity="tensor" for its operands'
        )

    @property
    def has_operands(self) -> bool:
        """Tell whether the operands are quantized or observed now."""
        return self.layer_plan.operands is not None and self.mode != "float"

    def operand(self, name: str, x: Tensor) -> Tensor:
        """Return an operand fake-quantized, observed or as it is, by the mode."""
        quantizer: Quantizer | None = getattr(self, f"{name}_quantizer")
        if quantizer is None or self.mode == "float":
            return x
        if self.mode == "observe":
            quantizer.calibrate(x.detach())
            return x
        return quantizer(x)  # type: ignore[no-any-return]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Return the output [.., L, Dv] and the probabilities [.., L, S] of scaled dot-product attention.

        query [.., L, D], key [.., S, D], value [.., S, Dv]. bias: broadcastable to [.., L, S], added to the scores,
        -inf where a query must not look. dropout: probability, applied behind the quantizer.
        """
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        query, key = self.operand("query", query), self.operand("key", key.transpose(-2, -1))
        with recomputed(query, key):
            scores = (query @ key) * scale
        probability = self.operand("probability", masked_softmax(scores, bias))
        probability = F.dropout(probability, dropout) if dropout > 0 else probability
        value = self.operand("value", value)
        with recomputed(probability, value):
            return probability @ value, probability


def masked_softmax(scores: Tensor, bias: Tensor | None) -> Tensor:
    """Return softmax(scores + bias) over the last axis; a query that may look nowhere gets zeros, as in torch."""
    if bias is None:
        return scores.softmax(-1)
    nowhere = (bias == -float("inf")).all(-1, keepdim=True)
    return (scores + bias.masked_fill(nowhere, 0.0)).softmax(-1).masked_fill(nowhere, 0.0)


def additive(mask: Tensor, like: Tensor, *, forbidden: bool) -> Tensor:
    """Return a mask as what is added to scores; a boolean one is -inf where it equals ``forbidden``."""
    if not mask.dtype.is_floating_point:
        blocked = mask.bool() == forbidden
        return like.new_zeros(mask.shape).masked_fill(blocked, -float("inf"))
    return mask.to(like.dtype)


@quantizes(nn.MultiheadAttention)
class MultiheadAttentionTwin(AttentionLayer):
    """Projections by q(x) q(W)^T, quantized matmuls, and ``out_proj`` called as the layer of its own that it is.

    W is ``in_proj_weight`` [3 E, E]. One input quantizer serves query, key and value: it sees each distinct tensor
    among them once, joined along the tokens, so that self-attention quantizes one tensor once.
    """

    weight_name = "in_proj_weight"
    input_axis = -1
    bypasses_children: ClassVar[bool] = True  # torch's forward reads out_proj.weight

    def check(self, plan: LayerPlan) -> None:
        """Refuse the options of nn.MultiheadAttention that are not supported."""
        super().check(plan)
        layer: Any = self
        reasons = {
            "kdim or vdim other than embed_dim": not layer._qkv_same_embed_dim,
            "add_bias_kv": layer.bias_k is not None,
            "add_zero_attn": layer.add_zero_attn,
        }
        for reason, given in reasons.items():
            if given:
                raise QuantizationError(f"nn.MultiheadAttention with {reason} has no quantized twin: leave it in float")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output, weights or None); arguments, shapes and layout as in ``nn.MultiheadAttention``."""
        layer: Any = self
        if is_causal and attn_mask is None:
            raise QuantizationError("is_causal=True only hints at what attn_mask is: give attn_mask too, as torch asks")
        batched, batch_first = query.dim() == 3, layer.batch_first or query.dim() == 2
        q, k, v = (self.to_heads(x, batch_first) for x in self.project(query, key, value))
        bias = self.merge_bias(q, k, key_padding_mask, attn_mask)
        out, weights = self.attend(q, k, v, bias, dropout=layer.dropout if self.training else 0.0)
        out = out.transpose(1, 2).flatten(2)  # [N, L, E]
        out = out if batch_first else out.transpose(0, 1)
        out = layer.out_proj(out if batched else out.squeeze(0))
        if not need_weights:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights if batched else weights.squeeze(0)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return the three projections, each of the shape of what it projects."""
        layer: Any = self
        if query is key and key is value:
            return tuple(self.run(query, lambda x, w: F.linear(x, w, layer.in_proj_bias)).chunk(3, -1))
        given = (query, key, value)
        distinct = list({id(x): x for x in given}.values())
        place = [next(i for i, x in enumerate(distinct) if x is y) for y in given]
        tokens = [x.shape[:-1].numel() for x in distinct]

        def each(joined: Tensor, weight: Tensor) -> Tensor:
            parts, weights = torch.split(joined, tokens), weight.chunk(3)
            biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
            return tuple(F.linear(parts[i], w, b) for i, w, b in zip(place, weights, biases))  # type: ignore[return-value]

        joined = torch.cat([x.reshape(-1, x.shape[-1]) for x in distinct])
        projected = self.run(joined, each)
        return tuple(p.reshape(x.shape) for p, x in zip(projected, given))

    def to_heads(self, x: Tensor, batch_first: bool) -> Tensor:
        """Return [N, H, L, D] for x [N, L, E], [L, N, E] or [L, E]."""
        layer: Any = self
        x = x.reshape(*x.shape[:-1], layer.num_heads, layer.head_dim)
        x = x if x.dim() == 4 else x.unsqueeze(0)
        return (x if batch_first else x.transpose(0, 1)).transpose(1, 2)

    def merge_bias(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor | None:
        """Return both masks as one bias, broadcastable to [N, H, L, S], or None."""
        length, source = q.shape[-2], k.shape[-2]
        bias = None
        if attn_mask is not None:  # [L, S] or [N * H, L, S]
            bias = additive(attn_mask, q, forbidden=True)
            bias = bias if bias.dim() == 2 else bias.view(-1, q.shape[1], length, source)
        if key_padding_mask is not None:  # [N, S] or [S]
            padding = additive(key_padding_mask, q, forbidden=True).view(-1, 1, 1, source)
            bias = padding if bias is None else bias + padding
        return bias
