"""Twins of layers that call functions instead of child layers: attention, and owners that read a child's weight.

The float ``forward`` runs unchanged while a ``TorchFunctionMode`` replaces the few calls that matter; nothing is
traced. Of attention it knows ``scaled_dot_product_attention`` and matmul - softmax - matmul.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode

from fewbits.errors import PlanError, QuantizationError
from fewbits.layers.attention import AttentionLayer, additive
from fewbits.layers.base import QuantizedLayer, quantizes, twin_class
from fewbits.plan import LayerPlan
from fewbits.quantizers import recomputed

TRANSFORMERS = (  # of these, attn_implementation "sdpa" and "eager" are both understood
    "llama.modeling_llama.LlamaAttention",
    "gpt2.modeling_gpt2.GPT2Attention",
    "bert.modeling_bert.BertSelfAttention",
    "bert.modeling_bert.BertCrossAttention",
    "detr.modeling_detr.DetrSelfAttention",
    "detr.modeling_detr.DetrCrossAttention",
    "owlvit.modeling_owlvit.OwlViTAttention",
    "owlv2.modeling_owlv2.Owlv2Attention",
    "swin.modeling_swin.SwinAttention",
    "omdet_turbo.modeling_omdet_turbo.OmDetTurboMultiheadAttention",
    "grounding_dino.modeling_grounding_dino.GroundingDinoMultiheadAttention",
    "mm_grounding_dino.modeling_mm_grounding_dino.MMGroundingDinoMultiheadAttention",
)


class WeightlessLayer(QuantizedLayer):
    """Mixin of twins without a weight and an input quantizer of their own."""

    weight_name = ""  # the name of no parameter
    quantizes_input = False

    def check(self, plan: LayerPlan) -> None:
        """Refuse a weight plan, and whatever else is refused."""
        if plan.weight is not None:
            raise QuantizationError(
                f"a {self.float_class.__name__} has no weight of its own, its child layers have: "
                "drop 'weight' from its plan, and give one to the children"
            )
        super().check(plan)


class AttentionTwin(WeightlessLayer, AttentionLayer):
    """Runs the float forward with quantized operands in its attention, and redirects reads of children's weights.

    reads: names of child Linears whose weight the float forward gives to ``F.linear`` instead of calling them.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the float forward returns."""
        if not self.reads and not self.has_operands:
            return super().forward(*args, **kwargs)
        mode = AttentionMode(self)
        with mode:
            out = super().forward(*args, **kwargs)
        mode.close()
        return out


class AttentionMode(TorchFunctionMode):
    """Replaces, inside one forward of a layer, the calls that its quantizers concern.

    stage: what comes next, "scores" (Q K^T), "softmax" or "output" (P V). seen: attentions so far.
    """

    def __init__(self, layer: AttentionTwin) -> None:
        super().__init__()
        self.layer, self.stage, self.seen = layer, "scores", 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the replacement of func, or func."""
        replacement = REPLACED.get(func)
        if replacement is None:
            return func(*args, **kwargs or {})
        return replacement(self, func, *args, **kwargs or {})

    def sdpa(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Replace ``scaled_dot_product_attention``."""
        if not self.layer.has_operands:
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        self.seen += 1
        return explicit_attention(self.layer, *args, **kwargs)

    def matmul(self, func: Any, a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
        """Quantize the operands of Q K^T, and V of P V (P was quantized before any dropout, in ``softmax``)."""
        between = a.dim() >= 3 and b.dim() >= 3 and not isinstance(b, nn.Parameter)
        if not between or self.stage == "softmax" or not self.layer.has_operands:
            return func(a, b, **kwargs)  # type: ignore[no-any-return]
        if self.stage == "scores":
            a, b, self.stage = self.layer.operand("query", a), self.layer.operand("key", b), "softmax"
        else:
            b, self.stage = self.layer.operand("value", b), "scores"
            self.seen += 1
        with recomputed(a, b):
            return func(a, b, **kwargs)  # type: ignore[no-any-return]

    def softmax(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Quantize the probabilities."""
        out: Tensor = func(*args, **kwargs)
        if self.stage != "softmax":
            return out
        self.stage = "output"
        return self.layer.operand("probability", out)

    def linear(self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Call the child whose weight this is, with the bias that is given in place of the child's own."""
        for name in self.layer.reads:
            child: Any = getattr(self.layer, name)
            if getattr(weight, "fewbits_layer", None) is child or weight is getattr(child, "weight", None):
                out: Tensor = child(x)
                if bias is child.bias:
                    return out
                out = out if child.bias is None else out - child.bias
                return out if bias is None else out + bias
        return func(x, weight, bias)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Raise QuantizationError if forward computed its attention where we could not see it."""
        if self.layer.has_operands and (not self.seen or self.stage != "scores"):
            raise QuantizationError(
                f"{self.layer.float_class.__name__} computed attention neither by scaled_dot_product_attention nor "
                "as matmul - softmax - matmul, so its operands cannot be quantized: drop 'operands' from its plan "
                "(or, for a transformers model, load it with attn_implementation='sdpa' or 'eager')"
            )


REPLACED: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: AttentionMode.sdpa,
    F.linear: AttentionMode.linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, torch.bmm, Tensor.bmm), AttentionMode.matmul),
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), AttentionMode.softmax),
}


def explicit_attention(
    layer: AttentionLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute ``F.scaled_dot_product_attention`` (same arguments) with the operands of a layer."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    if is_causal:  # torch allows no other mask beside it
        attn_mask = query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    bias = None if attn_mask is None else additive(attn_mask, query, forbidden=False)
    return layer.attend(query, key, value, bias, scale=scale, dropout=dropout_p)[0]


def register_attention(*types: type[nn.Module] | str) -> None:
    """Let plans quantize the attention operands of further layer types, given as classes or as ``module.Class``.

    Their forward must compute attention by ``scaled_dot_product_attention`` or as matmul - softmax - matmul; their
    projections stay layers of their own. For granularity "head" they must tell their heads, e.g. as ``num_heads``.
    """
    quantizes(*types)(AttentionTwin)


register_attention(*(f"transformers.models.{name}" for name in TRANSFORMERS))


@quantizes(
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.layers.attention_pool.AttentionPoolLatent",
    "timm.models.tiny_vit.Attention",
    "timm.models.vision_transformer.Attention",  # where older releases keep it
    "timm.models.swin_transformer.WindowAttention",
)
class TimmAttentionTwin(AttentionTwin):
    """timm's attention, which scales the query before or after our quantizer by its flag ``fused_attn``: ours is on."""

    @property
    def fused_attn(self) -> bool:
        """Hide the flag of the float layer, which comes back with its class."""
        return True

    @fused_attn.setter
    def fused_attn(self, value: bool) -> None:
        self.__dict__["fused_attn"] = value


@quantizes(
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2",
)
class ShiftedWindowAttentionTwin(AttentionTwin):
    """torchvision's Swin attention, whose forward reads the weights of its two Linears."""

    reads = ("qkv", "proj")
    bypasses_children: ClassVar[bool] = True


@quantizes("timm.models.beit.Attention", "timm.models.eva.EvaAttention")
class SplitBiasAttentionTwin(TimmAttentionTwin):
    """timm's BEiT and EVA attention, which give ``qkv.weight`` and a bias put together anew to ``F.linear``."""

    reads = ("qkv",)
    bypasses_children: ClassVar[bool] = True


@quantizes(nn.TransformerEncoderLayer, nn.TransformerEncoder)
class SlowPathTwin(WeightlessLayer):
    """Keeps torch's fused inference kernel out, which reads the weights of all children: it steps back for any mode."""

    only_output = True
    bypasses_children: ClassVar[bool] = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the float forward returns."""
        with BaseTorchFunctionMode():
            out = super().forward(*args, **kwargs)
        return self.finish(out)


def wrap_owners(model: nn.Module) -> None:
    """Swap in, with an empty plan, each layer that may use a quantized child's weight without calling the child."""
    for name, module in model.named_modules():
        twin = twin_class(type(module))
        if isinstance(module, QuantizedLayer) or twin is None or not twin.bypasses_children:
            continue
        if any(isinstance(child, QuantizedLayer) for child in module.modules()):
            _wrap(name, module, twin)


def _wrap(name: str, module: nn.Module, twin: Any) -> None:
    before = type(module)
    module.__class__ = twin
    try:
        module.attach(LayerPlan(), None)  # type: ignore[operator]
    except (PlanError, QuantizationError) as error:
        module.__class__ = before
        raise type(error)(f"layer {name!r}, whose children are to be quantized: {error}") from error
