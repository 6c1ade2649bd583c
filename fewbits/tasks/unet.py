"""A U-Net (Ronneberger et al. 2015, arXiv 1505.04597) whose branches meet in modules with names.

Against the paper: batch norm, padded convolutions, and narrower; a 1x1 convolution before nearest upsampling in place
of the 2x2 up-convolution, so that both branches of a node have the same width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import RecipeError
from fewbits.layers.concat import Concat

FUSIONS = ("concat", "gate")
BRANCHES = ("up", "skip")
SIZES = {  # channels at full, half, quarter, ... size: 0.22 M, 0.45 M, 1.0 M and 7.2 M parameters with concats
    "unet_nano": (12, 24, 48, 80),
    "unet_micro": (16, 32, 64, 128),
    "unet_small": (24, 48, 96, 192),
    "unet_base": (32, 64, 128, 256, 512),
}


class ConvBlock(nn.Sequential):
    """conv-bn-relu of [B, inputs, H, W] to [B, outputs, H, W]."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU())
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


class GatedAdd(nn.Module):
    """up + gate(up, skip) * skip, with the additive attention gate of Oktay et al. 2018 (arXiv 1804.03999, eq. 1-2).

    gate = sigmoid(conv(relu(bn(conv(up)) + bn(conv(skip))))), one number a pixel. up, skip: [B, C, H, W].
    """

    branches = BRANCHES

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 2, 4)
        self.from_up = nn.Conv2d(channels, inner, 1, bias=False)
        self.norm_up = nn.BatchNorm2d(inner)
        self.from_skip = nn.Conv2d(channels, inner, 1, bias=False)
        self.norm_skip = nn.BatchNorm2d(inner)
        self.relu = nn.ReLU()
        self.to_gate = nn.Conv2d(inner, 1, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, up: Tensor, skip: Tensor) -> Tensor:
        """Return [B, C, H, W]."""
        common = self.norm_up(self.from_up(up)) + self.norm_skip(self.from_skip(skip))
        gate = self.sigmoid(self.to_gate(self.relu(common)))
        out: Tensor = up + gate * skip
        return out


class UpBlock(nn.Module):
    """One step of the way up: the deep tensor, reduced and upsampled, meets the skip in ``fuse``; two convs follow."""

    def __init__(self, deep: int, channels: int, fusion: str) -> None:
        super().__init__()
        self.reduce = ConvBlock(deep, channels, kernel=1)
        self.fuse: nn.Module = Concat(BRANCHES) if fusion == "concat" else GatedAdd(channels)
        fused = 2 * channels if fusion == "concat" else channels
        self.convs = nn.Sequential(ConvBlock(fused, channels), ConvBlock(channels, channels))

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        """Return [B, channels, H, W] of a deep [B, deep, ~H/2, ~W/2] and a skip [B, channels, H, W]."""
        up = F.interpolate(self.reduce(deep), skip.shape[-2:], mode="nearest")
        out: Tensor = self.convs(self.fuse(up, skip))
        return out


class UNet(nn.Module):
    """Images [B, in_channels, H, W] -> logits [B, num_classes, H, W].

    widths: channels of each level, from full size on, each level half as high and wide (rounded down) as the one
    before. fusion: "concat" of the skips, or "gate", a gated add. Raises RecipeError for an unknown fusion, and for
    fewer than two levels.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        widths: Sequence[int] = SIZES["unet_nano"],
        fusion: str = "concat",
    ) -> None:
        super().__init__()
        if fusion not in FUSIONS:
            raise RecipeError(f"fusion of a U-Net is one of {FUSIONS}, got {fusion!r}")
        if len(widths) < 2 or min(widths) < 1:
            raise RecipeError(f"a U-Net has two levels or more of at least one channel, got widths={list(widths)}")
        inputs = (in_channels, *widths)
        self.down = nn.ModuleList(nn.Sequential(ConvBlock(a, b), ConvBlock(b, b)) for a, b in zip(inputs, widths))
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(
            UpBlock(deep, channels, fusion) for deep, channels in zip(widths[:0:-1], widths[-2::-1])
        )
        self.head = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, num_classes, H, W]; each side must be at least 2 ** (levels - 1) pixels."""
        skips = [self.down[0](x)]
        for block in list(self.down)[1:]:
            skips.append(block(self.pool(skips[-1])))
        x = skips.pop()
        for block in self.up:
            x = block(x, skips.pop())
        logits: Tensor = self.head(x)
        return logits
