"""Small models whose branches meet: a U-Net with a module that concatenates, and one that calls torch.cat."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Concat(nn.Module):
    def forward(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors, 1)


def block(inputs: int, outputs: int, stride: int = 1, norm: bool = True, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not norm)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs) if norm else nn.Identity(), nn.ReLU())


class UNet(nn.Module):
    """Two levels; the upper concat is a module, the lower one a call. kernel: of what takes the concats in."""

    def __init__(self, norm: bool = True, kernel: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.stem, self.down1 = block(3, 8, norm=norm), block(8, 12, 2, norm)
        self.down2 = block(12, 16, 2, norm)
        self.join1 = Concat()
        self.up1, self.up0 = block(16 + 12, 12, 1, norm, kernel), block(12 + 8, 8, 1, norm, kernel)
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        middle = self.down1(fine)
        deep = self.down2(middle)
        middle = self.up1(self.join1([F.interpolate(deep, scale_factor=2), middle]))
        out: Tensor = self.head(self.up0(torch.cat([F.interpolate(middle, scale_factor=2), fine], dim=1)))
        return out


NODES = ["join1.cat0", "cat0"]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(8, 8), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16))
        self.shortcut = nn.Conv2d(8, 16, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        out += self.shortcut(x)
        return out


class Csp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(16, 8), nn.Sequential(block(16, 8), block(8, 8)), block(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(torch.cat((self.a(x), self.b(x)), 1))
        return out


class Spp(nn.Module):
    """Pools of several sizes, and one over the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce = block(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        whole = F.interpolate(F.adaptive_avg_pool2d(x, 1), size=x.shape[2:])
        out: Tensor = self.reduce(torch.cat([x, F.max_pool2d(x, 5, 1, 2), whole], dim=1))
        return out


class Pan(nn.Module):
    """Top-down and bottom-up concats, a feature pyramid add, and blocks that are none of these."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.residual, self.csp, self.spp = block(3, 8), Residual(), Csp(), Spp()
        self.down = block(16, 16, 2)
        self.top_down, self.bottom_up = block(32, 16), block(32, 16)
        self.stride, self.lateral, self.out = block(16, 16, 2), nn.Conv2d(8, 16, 1), block(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.stem(x)
        middle = self.csp(self.residual(fine))
        deep = self.spp(self.down(middle))
        up = self.top_down(torch.cat([F.interpolate(deep, scale_factor=2), middle], 1))
        low = self.bottom_up(torch.cat([self.stride(up), deep], 1))
        pyramid = self.lateral(fine) + F.interpolate(up, scale_factor=2)
        logits = self.out(pyramid)
        return low, logits + F.interpolate(self.out(up), scale_factor=2)  # a sum that no layer follows


def settled(make: Callable[[], nn.Module], x: Tensor) -> nn.Module:
    """Return a model whose batch norms know the data, in eval mode."""
    model = make().train()
    with torch.no_grad():
        for _ in range(20):
            model(x)
    return model.eval()
