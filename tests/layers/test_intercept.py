"""Attention that calls functions, and owners that read a child's weight: real models, and the rules one by one."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fewbits.errors import QuantizationError
from fewbits.layers import (
    activation_quantizers,
    calibrate,
    call,
    dequantize,
    float_class,
    quantizable,
    quantize,
    quantized_layers,
    register_attention,
    set_mode,
    twin_class,
    wrap_owners,
)
from fewbits.layers.intercept import explicit_attention
from fewbits.layers.swap import layer_weight
from fewbits.plan import LayerPlan, Plan, TensorPlan

Case = tuple[nn.Module, Any, Callable[[Any], Tensor]]


def same(out: Tensor) -> Tensor:
    return out


def image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size)


def encoder() -> Case:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2), torch.randn(2, 7, 32), same


def torchvision_vit() -> Case:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)
    nn.init.normal_(model.heads.head.weight, std=0.2)  # torchvision starts it at zero
    return model, image(), same


def torchvision_swin(version: int = 1) -> Case:
    from torchvision.models import swin_transformer as swin

    block, down = (
        (swin.SwinTransformerBlock, swin.PatchMerging)
        if version == 1
        else (swin.SwinTransformerBlockV2, swin.PatchMergingV2)
    )
    model = swin.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=10, block=block, downsample_layer=down)
    return model, image(), same


def timm_model(name: str, size: int = 32, **options: Any) -> Case:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=10, **options), image(size), same


TINY_VIT = {"embed_dims": (16, 16, 32, 32), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)}


def tokens() -> dict[str, Tensor]:
    """Return a batch of two, the first sequence padded on the left."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": torch.randint(3, 50, (2, 9)), "attention_mask": mask}


def llama(how: str) -> Case:
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = hf.LlamaForCausalLM._from_config(config, attn_implementation=how)
    return model, tokens(), lambda out: out.logits


def gpt2(how: str) -> Case:
    hf = pytest.importorskip("transformers")
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = hf.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4, **ends)
    return hf.GPT2LMHeadModel._from_config(config, attn_implementation=how), tokens(), lambda out: out.logits


def bert(how: str) -> Case:
    hf = pytest.importorskip("transformers")
    config = hf.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    model = hf.BertModel._from_config(config, attn_implementation=how)
    return model, tokens(), lambda out: out.last_hidden_state


def detr(how: str) -> Case:
    hf = pytest.importorskip("transformers")
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    config = hf.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=5,
    )
    model = hf.DetrForObjectDetection(config)  # its backbone knows no sdpa, so this is set on the rest
    model.model.encoder.config._attn_implementation = model.model.decoder.config._attn_implementation = how
    return model, {"pixel_values": torch.randn(1, 3, 64, 64)}, lambda out: out.logits


def owlvit(how: str) -> Case:
    hf = pytest.importorskip("transformers")
    body = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = hf.OwlViTConfig(
        text_config={**body, **ends, "vocab_size": 50, "max_position_embeddings": 16},
        vision_config={**body, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    model = hf.OwlViTForObjectDetection._from_config(config, attn_implementation=how)
    return model, {**tokens(), "pixel_values": image()}, lambda out: out.logits


CASES: dict[str, Callable[[], Case]] = {
    "nn.TransformerEncoder": encoder,
    "torchvision vit": torchvision_vit,
    "torchvision swin": torchvision_swin,
    "torchvision swin v2": lambda: torchvision_swin(2),
    "timm deit_tiny": lambda: timm_model("deit_tiny_patch16_224", img_size=32, depth=3),
    "timm tiny_vit": lambda: timm_model("tiny_vit_5m_224", 64, **TINY_VIT),
    "timm mobilevit": lambda: timm_model("mobilevit_xxs", 64),
    "timm beit": lambda: timm_model("beit_base_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=4),
    "timm eva": lambda: timm_model("eva02_tiny_patch14_224", 28, img_size=28, depth=2),
    "timm swin": lambda: timm_model(
        "swin_tiny_patch4_window7_224", img_size=32, depths=(2,), embed_dim=24, num_heads=(3,), window_size=4
    ),
    "llama sdpa": lambda: llama("sdpa"),
    "llama eager": lambda: llama("eager"),
    "gpt2 sdpa": lambda: gpt2("sdpa"),
    "gpt2 eager": lambda: gpt2("eager"),
    "bert sdpa": lambda: bert("sdpa"),
    "bert eager": lambda: bert("eager"),
    "detr sdpa": lambda: detr("sdpa"),
    "detr eager": lambda: detr("eager"),
    "owlvit sdpa": lambda: owlvit("sdpa"),
    "owlvit eager": lambda: owlvit("eager"),
}
ALL = pytest.mark.parametrize("name", CASES)


def has_operands(layer: nn.Module) -> bool:
    return getattr(twin_class(float_class(layer)), "quantizes_operands", False)


def plan(model: nn.Module, bits: int, operands: int | None = None, *, granularity: str = "tensor") -> Plan:
    """Plan all that each quantizable layer has at one width; or with ``operands`` given, operands only."""
    weight = TensorPlan(bits, granularity="channel", range="minmax")
    activation = TensorPlan(bits, symmetric=False, range="minmax")
    matmuls = TensorPlan(operands or bits, symmetric=False, range="minmax", granularity=granularity)
    rules = []
    for name, layer in quantizable(model).items():
        if name.endswith("query_position_embeddings"):  # DETR reads this table without calling it
            continue
        takes_input = twin_class(float_class(layer)).quantizes_input and not operands  # type: ignore[union-attr]
        layer_plan = LayerPlan(
            weight=weight if layer_weight(layer) is not None and not operands else None,
            input=activation if takes_input else None,
            operands=matmuls if has_operands(layer) else None,
        )
        rules.append((name, layer_plan))
    return Plan(tuple(rules))


def swapped(model: nn.Module, which: Plan, batch: Any) -> nn.Module:
    """Quantize a copy of a model wholly and calibrate it; no layer may be left unreached."""
    model = copy.deepcopy(model)
    quantize(model, which, verbose=False)
    wrap_owners(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        calibrate(model, [batch])
    return model


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


@ALL
def test_operands_alone(name: str) -> None:
    """At 16 bits the intercepted attention is the float one (a wrong formula would be far off); at 2 bits it is not.

    A 16-bit operand is off by at most half of 1/65535 of its range, some 1e-5; a 2-bit one by 2 ** 14 times that.
    """
    model, batch, pick = CASES[name]()
    model.eval()
    with torch.no_grad():
        expected = pick(call(model, batch))
        for granularity in ("tensor", "head"):
            fine = swapped(model, plan(model, 8, 16, granularity=granularity), batch)
            error = distance(pick(call(fine, batch)), expected)
            assert 0 < error < 5e-4
        coarse = swapped(model, plan(model, 8, 2), batch)
        assert distance(pick(call(coarse, batch)), expected) > 50 * error


@ALL
def test_whole_model(name: str) -> None:
    """Everything quantized: modes, closeness, copies, checkpoints, gradients, and the way back.

    An 8-bit tensor whose range is some 8 standard deviations carries about 1% of noise, each matmul takes two, and
    these models have up to 30 in a row: sqrt(60)%, more where attention is sharp. Measured over three seeds: 0.4%
    (DETR) to 13% (Swin V2, whose cosine attention multiplies by 10), and at 2 bits 38% to 310%, 15 times as much.
    """
    model, batch, pick = CASES[name]()
    model.eval()
    with torch.no_grad():
        expected = pick(call(model, batch))
        quantized = swapped(model, plan(model, 8), batch)
        out = pick(call(quantized, batch))
        error = distance(out, expected)
        assert 0 < error < 0.2
        for mode in ("float", "observe"):
            with set_mode(copy.deepcopy(quantized), mode), set_mode(quantized, mode):
                assert distance(pick(call(quantized, batch)), expected) < 1e-5
        assert distance(pick(call(swapped(model, plan(model, 2), batch), batch)), expected) > max(0.3, 5 * error)


@ALL
def test_state_and_gradients(name: str) -> None:
    """Copies and reloaded checkpoints agree to the bit, gradients reach what they reach in float, and back to float."""
    model, batch, pick = CASES[name]()
    model.eval()
    quantized = swapped(model, plan(model, 8), batch)
    with torch.no_grad():
        out = pick(call(quantized, batch))
        assert torch.equal(pick(call(copy.deepcopy(quantized), batch)), out)
        file = io.BytesIO()
        torch.save(quantized.state_dict(), file)
        file.seek(0)
        fresh = copy.deepcopy(model)
        quantize(fresh, plan(fresh, 8), verbose=False)
        wrap_owners(fresh)
        fresh.load_state_dict(torch.load(file, weights_only=False))
        assert torch.equal(pick(call(fresh, batch)), out)
    for net in (model, quantized):
        net.train().eval()  # tiny_vit keeps its biases from the last forward, which had no gradients
        pick(call(net, batch)).square().mean().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    found = {n for n, p in quantized.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached - found <= {n for n in reached if n.endswith("bias")}  # a key's bias has no gradient but rounding
    for layer in filter(has_operands, quantized_layers(quantized).values()):
        assert all(q.scale.grad is not None for q in activation_quantizers(layer))
    expected = pick(call(model, batch))
    dequantize(quantized)
    assert not quantized_layers(quantized)
    assert torch.equal(pick(call(quantized, batch)), expected)


@pytest.mark.parametrize("child", ["qkv", "proj"])
@pytest.mark.parametrize("version", [1, 2])
def test_swin_runs_a_quantized_child_though_it_reads_its_weight(version: int, child: str) -> None:
    """A plan that names only the child is followed: weights by value, inputs by calibration."""
    model, batch, _ = torchvision_swin(version)
    model.eval()
    for bias in (p for n, p in model.named_parameters() if n.endswith(("qkv.bias", "proj.bias"))):
        nn.init.normal_(bias)  # version 2 hands on another bias than that of the child: without a key part
    plain = copy.deepcopy(model)
    name = f"features.1.0.attn.{child}"
    quantize(model, Plan(((name, LayerPlan(weight=TensorPlan(2))),)), verbose=False)
    wrap_owners(model)
    layer: Any = model.get_submodule(name)
    plain.get_submodule(name).weight.data = layer.weight_quantizer(layer.weight).detach()
    torch.testing.assert_close(model(batch), plain(batch), atol=1e-5, rtol=1e-5)
    quantize(model, Plan(((name, LayerPlan(input=TensorPlan(8))),)), verbose=False)
    calibrate(model, [batch])
    assert layer.input_quantizer.calibrated == 1


def test_a_packed_child_is_called_too() -> None:
    """A child that decodes its weight on demand says by ``fewbits_layer`` whose weight that is."""

    class Packed(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.bias, self.codes, self.calls = linear.bias, linear.weight.detach(), 0

        @property
        def weight(self) -> Tensor:
            decoded = self.codes.clone()
            decoded.fewbits_layer = self  # type: ignore[attr-defined]
            return decoded

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return F.linear(x, self.codes, self.bias)

    model, batch, _ = torchvision_swin()
    model.eval()
    expected = model(batch)
    quantize(model, Plan((("features.1.0.attn.qkv", LayerPlan(weight=TensorPlan(2))),)), verbose=False)
    wrap_owners(model)
    attn: Any = model.get_submodule("features.1.0.attn")
    attn.qkv = Packed(attn.qkv)
    assert torch.equal(model(batch), expected)
    assert attn.qkv.calls == 1


def test_timm_without_fused_attention_is_quantized_the_same() -> None:
    """timm's flag ``fused_attn`` has it scale the query first; while quantized, the flag is on and not lost."""
    model, batch, _ = CASES["timm deit_tiny"]()
    attn: Any = model.eval().get_submodule("blocks.0.attn")
    attn.fused_attn = True
    expected = swapped(model, plan(model, 4), batch)(batch)
    attn.fused_attn = False
    assert torch.equal(swapped(model, plan(model, 4), batch)(batch), expected)
    quantize(model, plan(model, 4), verbose=False)
    assert attn.fused_attn
    dequantize(model)
    assert attn.fused_attn is False


class Block(nn.Module):
    """Hand-written causal attention, as in a small GPT."""

    def __init__(self, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_head, self.dropout = heads, dropout
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor, how: str = "sdpa") -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        if how == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout * self.training)
        elif how == "bmm":
            scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) / q.shape[-1] ** 0.5
            out = torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view_as(v)
        else:
            out = torch.einsum("bhls,bhsd->bhld", torch.einsum("bhld,bhsd->bhls", q, k).softmax(-1), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Headless(nn.Module):
    """Attention that does not tell its number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


register_attention(Block)
OPERANDS = LayerPlan(operands=TensorPlan(4, symmetric=False))


def test_registering_a_class_of_ones_own() -> None:
    assert twin_class(Headless) is None
    register_attention(Headless)
    assert twin_class(Headless) is not None
    with pytest.raises(QuantizationError, match=r"'0'.*number of heads"):
        per_head = LayerPlan(operands=TensorPlan(4, granularity="head"))
        quantize(nn.Sequential(Headless()), Plan((("0", per_head),)), verbose=False)
    model, x = nn.Sequential(Block(dropout=0.5)).eval(), torch.randn(3, 5, 8)
    expected = model(x)
    quantize(model, Plan((("0", LayerPlan(operands=TensorPlan(8, granularity="head"))),)), verbose=False)
    calibrate(model, [x])
    assert 0 < distance(model(x), expected) < 0.03
    assert model[0].key_quantizer.scale.shape == (2,)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))  # dropout


def test_bmm_and_what_cannot_be_seen() -> None:
    """Attention by bmm is followed; by einsum it is not, which is an error and not a silence."""
    model, x = nn.Sequential(Block()).eval(), torch.randn(3, 5, 8)
    quantize(model, Plan((("0", OPERANDS),)), verbose=False)
    calibrate(model[0], [(x, "bmm")])
    assert distance(model[0](x, "bmm"), dequantize(copy.deepcopy(model))[0](x, "bmm")) > 1e-3
    with pytest.raises(QuantizationError, match=r"Block computed attention neither.*drop 'operands'"):
        model[0](x, "einsum")
    assert torch.overrides._get_current_function_mode() is None


def test_plans_that_a_weightless_layer_cannot_follow() -> None:
    for wrong, match in (
        (LayerPlan(weight=TensorPlan(4)), "'0'.*no weight of its own"),
        (LayerPlan(input=TensorPlan(4)), "'0'.*drop 'input'"),
    ):
        model = nn.Sequential(Block())
        with pytest.raises(QuantizationError, match=match):
            quantize(model, Plan((("0", wrong),)), verbose=False)
        assert type(model[0]) is Block


@given(
    st.sampled_from(["none", "bool", "float", "broadcast", "causal"]),
    st.integers(1, 2),
    st.sampled_from([(4, 1), (4, 2), (4, 4)]),
    st.integers(1, 5),
    st.integers(1, 5),
    st.none() | st.floats(0.1, 2),
    st.integers(0, 99),
)
def test_explicit_attention_is_torchs(
    kind: str, batch: int, heads: tuple[int, int], length: int, source: int, scale: float | None, seed: int
) -> None:
    """Without quantizers it computes scaled_dot_product_attention: masks, scale, grouped heads."""
    layer: Any = nn.Sequential(Block())
    quantize(layer, Plan((("0", OPERANDS),)), verbose=False)
    layer[0].mode = "float"
    torch.manual_seed(seed)
    q, k = torch.randn(batch, heads[0], length, 4), torch.randn(batch, heads[1], source, 4)
    v = torch.randn(batch, heads[1], source, 3)
    mask = {
        "bool": torch.rand(batch, 1, length, source) < 0.7,
        "float": torch.randn(batch, heads[0], length, source),
        "broadcast": torch.randn(1, source),
    }.get(kind)
    options = {"attn_mask": mask, "is_causal": kind == "causal", "scale": scale, "enable_gqa": heads[0] != heads[1]}
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(explicit_attention(layer[0], q, k, v, **options), expected, atol=1e-5, rtol=1e-5)
