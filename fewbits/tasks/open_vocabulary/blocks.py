"""Blocks of an open-vocabulary detector: convolution, bottleneck, cross-stage partial blocks without and with texts.

YOLO-World (Cheng et al. 2024) builds on cross-stage partial blocks (Wang et al. 2020) that keep the result of every
bottleneck, and on spatial pyramid pooling (He et al. 2015).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewbits.layers.concat import Concat
from fewbits.tasks.open_vocabulary.attention import MaxSigmoidAttention


def conv(width_in: int, width: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """Return a convolution, batch norm and SiLU."""
    layer = nn.Conv2d(width_in, width, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width, eps=1e-3, momentum=0.03), nn.SiLU(inplace=True))


class Bottleneck(nn.Module):
    """Two 3x3 convolutions, with a residual around them in the backbone."""

    def __init__(self, width: int, residual: bool) -> None:
        super().__init__()
        self.first, self.second, self.residual = conv(width, width, 3), conv(width, width, 3), residual

    def forward(self, x: Tensor) -> Tensor:
        """Return the shape of x."""
        y: Tensor = self.second(self.first(x))
        return x + y if self.residual else y


class CSP(nn.Module):
    """Half of the channels pass the bottlenecks one after the other; the last convolution sees every stage of it."""

    def __init__(self, width_in: int, width: int, depth: int, residual: bool, branches: int = 0) -> None:
        super().__init__()
        half = width // 2
        self.split = conv(width_in, 2 * half)
        self.blocks = nn.ModuleList(Bottleneck(half, residual) for _ in range(depth))
        self.fuse = conv((2 + depth + branches) * half, width)

    def stages(self, x: Tensor) -> list[Tensor]:
        """Return both halves, and what each bottleneck makes of the second, [B, width / 2, H, W] each."""
        found = list(self.split(x).chunk(2, 1))
        for block in self.blocks:
            found.append(block(found[-1]))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, width, H, W]."""
        fused: Tensor = self.fuse(torch.cat(self.stages(x), 1))
        return fused


class TextCSP(CSP):
    """A CSP block whose last bottleneck has one more branch behind it, gated by texts. width / 2 is a multiple of
    head_width."""

    def __init__(self, width_in: int, width: int, depth: int, text_width: int, head_width: int) -> None:
        super().__init__(width_in, width, depth, residual=False, branches=1)
        self.attention = MaxSigmoidAttention(width // 2, text_width, head_width)

    def forward(self, x: Tensor, texts: Tensor) -> Tensor:  # type: ignore[override]
        """Return [B, width, H, W]. texts: [T, D] or [B, T, D]."""
        found = self.stages(x)
        fused: Tensor = self.fuse(torch.cat([*found, self.attention(found[-1], texts)], 1))
        return fused


class PyramidPooling(nn.Module):
    """Pools over ever wider surroundings, and mixes them with the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.fuse = conv(width, width // 2), conv(2 * width, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the shape of x."""
        seen = [self.reduce(x)]
        for _ in range(3):
            seen.append(self.pool(seen[-1]))
        fused: Tensor = self.fuse(torch.cat(seen, 1))
        return fused


def joint() -> Concat:
    """Return where the neck joins a deep branch and a shallow one."""
    return Concat(("deep", "shallow"))
