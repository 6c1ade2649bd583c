"""The reference language model: a decoder-only transformer (GPT) in the sizes of nanoGPT.

Plain ``nn.Linear``, ``nn.Embedding`` and ``F.scaled_dot_product_attention``, so that ``fewbits.quantize`` swaps them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import DataError, RecipeError, nearest
from fewbits.layers import register_attention
from fewbits.tasks.generate import Cache

ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class GPTConfig:
    """vocabulary: tokens; context: the most positions; width: of the residual stream, ``heads`` of equal size in it.

    positions: "rotary" (RoPE, Su et al. 2021) or "learned". norm: "layer" or "rms". bias: of all linear layers and
    layer norms. tied: the head reads the embedding's weight. Raises RecipeError for sizes that do not fit.
    """

    vocabulary: int = 256
    context: int = 256
    layers: int = 6
    heads: int = 6
    width: int = 384
    dropout: float = 0.0
    positions: Literal["rotary", "learned"] = "learned"
    norm: Literal["layer", "rms"] = "layer"
    bias: bool = False
    tied: bool = True

    def __post_init__(self) -> None:
        for name in ("vocabulary", "context", "layers", "heads", "width"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise RecipeError(f"{name} of a GPT must be a whole number from 1, got {value!r}")
        if self.width % self.heads:
            raise RecipeError(f"width {self.width} is no multiple of {self.heads} heads; choose one that is")
        if self.positions not in ("rotary", "learned") or self.norm not in ("layer", "rms"):
            raise RecipeError(f"positions rotary or learned, norm layer or rms; got {self.positions!r}, {self.norm!r}")
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise RecipeError(f"rotary positions need an even head size, got {self.width} / {self.heads}")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"dropout must be from 0 to below 1, got {self.dropout!r}")


CONFIGS = {
    "gpt_nano": GPTConfig(layers=3, heads=3, width=48, context=64),
    "gpt_micro": GPTConfig(layers=4, heads=4, width=128, context=128),
    "gpt_char": GPTConfig(layers=6, heads=6, width=384, context=256, dropout=0.2),  # nanoGPT's character model
    "gpt2": GPTConfig(vocabulary=50304, layers=12, heads=12, width=768, context=1024, bias=True),
}


class Attention(nn.Module):
    """Causal attention of several heads over x [B, T, width]."""

    def __init__(self, config: GPTConfig, index: int) -> None:
        super().__init__()
        self.num_heads, self.index, self.dropout = config.heads, index, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.project = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, cache: Cache | None = None) -> Tensor:
        """Return [B, T, width]; rotation: cosines and sines [T, head size] of the positions, None: not rotary."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        mask = None
        if cache is not None:
            key, value = cache.extend(self.index, key, value)
            new, seen = query.shape[-2], key.shape[-2] - query.shape[-2]
            if seen:
                mask = torch.ones(new, seen + new, dtype=torch.bool, device=x.device).tril(seen)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=mask is None)
        projected: Tensor = self.project(y.transpose(1, 2).flatten(2))
        return projected


register_attention(Attention)  # so that a plan may quantize the operands of its two matmuls too


class Block(nn.Module):
    """Attention and an MLP of four times the width, each behind a norm and added to its input."""

    def __init__(self, config: GPTConfig, index: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = make_norm(config), make_norm(config)
        self.attention = Attention(config, index)
        self.up = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.down = nn.Linear(4 * config.width, config.width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, cache: Cache | None = None) -> Tensor:
        """Return [B, T, width]."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation, cache))
        out: Tensor = x + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)))))
        return out


class GPT(nn.Module):
    """Tokens to logits of the next token."""

    cosines: Tensor
    sines: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config, self.context, self.vocabulary = config, config.context, config.vocabulary
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        rotary = config.positions == "rotary"
        self.position = None if rotary else nn.Embedding(config.context, config.width)
        if rotary:
            for name, table in zip(("cosines", "sines"), rotations(config.context, config.width // config.heads)):
                self.register_buffer(name, table, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.apply(initialize)
        for name, weight in self.named_parameters():
            if name.endswith(("project.weight", "down.weight")):  # GPT-2: what adds up starts smaller
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.layers))
        if config.tied:
            self.head.weight = self.embedding.weight

    new_cache = Cache  # an empty one, for ``forward``

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return logits [B, T, vocabulary] of int64 tokens [B, T]; with a cache these follow the tokens in it.

        Raises DataError for more positions than the context.
        """
        seen = 0 if cache is None else cache.length
        end = seen + tokens.shape[1]
        if end > self.context:
            raise DataError(f"{end} tokens are more than the model's context of {self.context}; give fewer")
        x, rotation = self.embedding(tokens), None
        if self.position is None:
            rotation = self.cosines[seen:end], self.sines[seen:end]
        else:
            x = x + self.position(torch.arange(seen, end, device=tokens.device))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotation, cache)
        logits: Tensor = self.head(self.norm(x))
        return logits


def gpt(name: str, **changes: Any) -> GPT:
    """Build a GPT by the name of a configuration; ``changes`` are fields of ``GPTConfig``.

    Raises RecipeError for an unknown name or field, and for sizes that do not fit.
    """
    if name not in CONFIGS:
        raise RecipeError(f"unknown GPT configuration {name!r}{nearest(name, CONFIGS)}; known: {sorted(CONFIGS)}")
    known = list(GPTConfig.__dataclass_fields__)
    for field in changes:
        if field not in known:
            raise RecipeError(f"a GPT has no option {field!r}{nearest(field, known)}; known: {known}")
    return GPT(replace(CONFIGS[name], **changes))


def make_norm(config: GPTConfig) -> nn.Module:
    """Return a norm over the width."""
    return nn.RMSNorm(config.width) if config.norm == "rms" else nn.LayerNorm(config.width, bias=config.bias)


def initialize(module: nn.Module) -> None:
    """Draw the weights of a layer as GPT-2 does: normal, 0.02 wide, biases 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def rotations(context: int, size: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [context, size] of the angle position * base ** (-2 i / size), halves alike."""
    rates = ROTARY_BASE ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.outer(torch.arange(context, dtype=torch.float64), rates).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn pairs (i, i + D/2) of x [B, heads, T, D] by the angles of their positions."""
    left, right = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-right, left], dim=-1) * sines
