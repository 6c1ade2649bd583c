"""Where text meets the image inside of the neck: max-sigmoid attention and image-pooling attention, and their twins.

"YOLO-World: Real-Time Open-Vocabulary Object Detection" (Cheng et al. 2024, arXiv 2401.17270), section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.layers.attention import AttentionLayer
from fewbits.layers.base import quantizes
from fewbits.layers.intercept import WeightlessLayer, register_attention

TEXTS_AT_ONCE = 512  # texts whose scores are held at a time: a vocabulary of 10,000 fits into memory
CELLS = 3  # image-pooling attention sees each feature map as 3 x 3 tokens


class MaxSigmoidAttention(nn.Module):
    """Features gated by how well the best text fits: y * sigmoid(max_t <x, g_t> / sqrt(d) + b), for each head.

    y: the features through a 3x3 convolution and batch norm; g: texts through a linear layer, ``guide``. width: of x, a
    multiple of the head width d. text_width: D of the texts.
    """

    def __init__(self, width: int, text_width: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.head_width = width // head_width, head_width
        self.guide: nn.Module = nn.Linear(text_width, width)
        self.bias = nn.Parameter(torch.zeros(self.heads))
        self.project = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width, eps=1e-3, momentum=0.03)

    def forward(self, x: Tensor, texts: Tensor) -> Tensor:
        """Return the shape of x, [B, width, H, W]. texts: [T, D], or [B, T, D] where they differ by image."""
        query = self.operand("query", torch.unflatten(x, 1, (self.heads, -1)).flatten(3).mT)  # [B, heads, H W, d]
        guide: Tensor = self.guide(texts)
        key = self.operand("key", split_heads(guide, self.heads).mT)  # [.., heads, d, T]
        best = (query @ key[..., :TEXTS_AT_ONCE]).amax(-1)
        for start in range(TEXTS_AT_ONCE, key.shape[-1], TEXTS_AT_ONCE):
            best = torch.maximum(best, (query @ key[..., start : start + TEXTS_AT_ONCE]).amax(-1))
        gate = (best * self.head_width**-0.5 + self.bias[:, None]).sigmoid()  # [B, heads, H W]
        gate = gate.reshape(x.shape[0], self.heads, 1, *x.shape[-2:])
        y: Tensor = self.norm(self.project(x))
        gated: Tensor = torch.unflatten(y, 1, (self.heads, -1)) * gate
        return gated.flatten(1, 2)

    def operand(self, name: str, x: Tensor) -> Tensor:
        """Return an operand of the product as it is; the quantized twin rounds it."""
        return x


@quantizes(MaxSigmoidAttention)
class MaxSigmoidTwin(WeightlessLayer, AttentionLayer):
    """Max-sigmoid attention whose product takes quantized operands; its linear layer and convolution are children."""

    operand_axes: ClassVar[Mapping[str, int]] = {"query": -1, "key": -2}


class ImagePoolingAttention(nn.Module):
    """Texts that have looked at the image: t + out(attention of texts to 3 x 3 tokens of each feature map).

    widths: channels of the feature maps. text_width: D. width: of the attention, a multiple of head_width.
    """

    def __init__(self, widths: Sequence[int], text_width: int, width: int, head_width: int) -> None:
        super().__init__()
        self.heads = width // head_width
        self.reduce = nn.ModuleList(nn.Conv2d(c, width, 1) for c in widths)
        self.query: nn.Module = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        self.key = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.value = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.out = nn.Linear(width, text_width)

    def forward(self, features: Sequence[Tensor], texts: Tensor) -> Tensor:
        """Return [B, T, D]. texts: [T, D]."""
        maps = [pooled(reduce(x)) for reduce, x in zip(self.reduce, features)]
        tokens = torch.cat(maps, 1)  # [B, 27, width]
        query = split_heads(self.query(texts), self.heads).expand(tokens.shape[0], -1, -1, -1)
        key, value = (split_heads(layer(tokens), self.heads) for layer in (self.key, self.value))
        seen = F.scaled_dot_product_attention(query, key, value)
        found: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return texts + found


register_attention(ImagePoolingAttention)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return [..., heads, T, d] of [..., T, heads * d]."""
    return torch.unflatten(x, -1, (heads, -1)).transpose(-3, -2)


def pooled(x: Tensor) -> Tensor:
    """Return the largest values in 3 x 3 cells as tokens, [B, 9, C] of [B, C, H, W].

    It is adaptive max pooling by its definition: runtimes have none for sizes that do not divide by 3.
    """
    rows, columns = ([(i * n // CELLS, -(-(i + 1) * n // CELLS)) for i in range(CELLS)] for n in x.shape[-2:])
    x = torch.stack([x[..., top:bottom, :].amax(-2) for top, bottom in rows], -2)
    return torch.stack([x[..., left:right].amax(-1) for left, right in columns], -1).flatten(2).mT


class Baked(nn.Module):
    """A result that no longer depends on what it was computed from: a constant of a fixed vocabulary."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, _: Tensor) -> Tensor:
        """Return the constant."""
        return self.value
