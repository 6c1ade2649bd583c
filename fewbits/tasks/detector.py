"""A small anchor-free detector: CSP backbone, PAN neck, decoupled heads, one prediction a point of the feature maps.

CSP: Wang et al. 2020 (CSPNet). PAN: Liu et al. 2018. One box a point, by its distances to the four sides, and a focal
start of the classes: Tian et al. 2019 (FCOS). Pooled context: He et al. 2015 (SPP). Assignment and loss: ``tood``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import DataError, RecipeError
from fewbits.layers.concat import Concat
from fewbits.tasks.tood import Predictions, tood_loss

STRIDES = (8, 16, 32)
PRIOR = 0.01  # score of every class at the start: most points see nothing
FIRST_DISTANCE = 1.5  # strides from a point to the sides of its box at the start: the small learn slowly, so fit them
FARTHEST = 5.0  # logarithm of the largest distance in strides


@dataclass(frozen=True)
class Size:
    """widths: channels of the backbone at strides 2, 4, 8, 16, 32. neck: channels of neck and heads. depth: bottlenecks
    of a CSP block. head: 3x3 convolutions of each branch of a head."""

    widths: tuple[int, int, int, int, int]
    neck: int
    depth: int
    head: int


SIZES = {
    "detector_nano": Size((16, 24, 40, 64, 96), 48, 1, 1),
    "detector_small": Size((16, 32, 64, 96, 160), 64, 1, 2),
    "detector_medium": Size((24, 48, 96, 160, 256), 96, 2, 2),
}


def conv(width_in: int, width: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """Return a convolution, batch norm and relu."""
    layer = nn.Conv2d(width_in, width, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


class Bottleneck(nn.Module):
    """1x1 and 3x3 convolutions with a residual around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.mix = conv(width, width), conv(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the shape of x."""
        mixed: Tensor = self.mix(self.reduce(x))
        return x + mixed


class CSP(nn.Module):
    """Cross-stage partial block: half of the channels pass bottlenecks, half go by, and both are mixed."""

    def __init__(self, width_in: int, width: int, depth: int) -> None:
        super().__init__()
        half = width // 2
        self.main, self.by, self.fuse = conv(width_in, half), conv(width_in, half), conv(2 * half, width)
        self.blocks = nn.Sequential(*(Bottleneck(half) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, width, H, W]."""
        fused: Tensor = self.fuse(torch.cat([self.blocks(self.main(x)), self.by(x)], 1))
        return fused


class Context(nn.Module):
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


class Backbone(nn.Module):
    """From images to features at strides 8, 16 and 32."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = size.widths
        self.stem = nn.Sequential(conv(3, c1, 3, 2), conv(c1, c2, 3, 2), CSP(c2, c2, 1))
        self.stage3 = nn.Sequential(conv(c2, c3, 3, 2), CSP(c3, c3, size.depth))
        self.stage4 = nn.Sequential(conv(c3, c4, 3, 2), CSP(c4, c4, size.depth))
        self.stage5 = nn.Sequential(conv(c4, c5, 3, 2), CSP(c5, c5, size.depth), Context(c5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return [B, c3, H/8, W/8], [B, c4, H/16, W/16], [B, c5, H/32, W/32]."""
        p3 = self.stage3(self.stem(x))
        p4 = self.stage4(p3)
        return p3, p4, self.stage5(p4)


class Neck(nn.Module):
    """Path aggregation: top-down, then bottom-up. Each of the four fusions joins a deep branch and a shallow one."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width, depth = size.neck, size.depth
        self.lateral3, self.lateral4, self.lateral5 = (conv(c, width) for c in size.widths[2:])
        self.fuse4, self.fuse3, self.fuse4_up, self.fuse5_up = (Concat(("deep", "shallow")) for _ in range(4))
        self.top4, self.top3, self.out4, self.out5 = (CSP(2 * width, width, depth) for _ in range(4))
        self.down3, self.down4 = conv(width, width, 3, 2), conv(width, width, 3, 2)

    def forward(self, features: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return features of the neck's width at strides 8, 16 and 32."""
        p3, p4, p5 = features
        l5 = self.lateral5(p5)
        t4 = self.top4(self.fuse4(_up(l5), self.lateral4(p4)))
        o3 = self.top3(self.fuse3(_up(t4), self.lateral3(p3)))
        o4 = self.out4(self.fuse4_up(self.down3(o3), t4))
        return o3, o4, self.out5(self.fuse5_up(self.down4(o4), l5))


class Head(nn.Module):
    """Class logits and box distances at one stride, by branches of their own."""

    def __init__(self, width: int, classes: int, depth: int) -> None:
        super().__init__()
        self.class_tower = nn.Sequential(*(conv(width, width, 3) for _ in range(depth)))
        self.box_tower = nn.Sequential(*(conv(width, width, 3) for _ in range(depth)))
        self.class_out, self.box_out = nn.Conv2d(width, classes, 1), nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [B, H * W, classes] and distances in strides [B, H * W, 4]."""
        logits, raw = self.class_out(self.class_tower(x)), self.box_out(self.box_tower(x))
        return logits.flatten(2).mT, raw.clamp(max=FARTHEST).exp().flatten(2).mT


class Detector(nn.Module):
    """Images [B, 3, H, W] to boxes and scores [B, points, 4 + classes]; H and W are multiples of 32.

    Boxes are corners x1, y1, x2, y2 in pixels, scores are 0..1 for every class by itself. Given targets as
    ``DetectionExamples.gather`` makes them, it returns the loss instead.
    """

    def __init__(self, size: Size, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.backbone, self.neck = Backbone(size), Neck(size)
        self.heads = nn.ModuleList(Head(size.neck, classes, size.head) for _ in STRIDES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for head in self.heads:
            assert isinstance(head, Head) and head.class_out.bias is not None and head.box_out.bias is not None
            prior, distance = -math.log((1 - PRIOR) / PRIOR), math.log(FIRST_DISTANCE)
            for out, bias in ((head.class_out, prior), (head.box_out, distance)):
                nn.init.normal_(out.weight, std=0.01)
                nn.init.constant_(out.bias, bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        """See the class. Raises DataError for sides that are no multiples of 32."""
        found = self.predict(images)
        if targets is None:
            return torch.cat([found.boxes, found.logits.sigmoid()], 2)
        return tood_loss(found, targets)

    def predict(self, images: Tensor) -> Predictions:
        """Return what the heads say, and the points it belongs to."""
        if any(side % STRIDES[-1] for side in images.shape[-2:]):
            raise DataError(f"height and width must be multiples of {STRIDES[-1]}, got {list(images.shape[-2:])}")
        features = self.neck(self.backbone(images))
        logits, distances = zip(*(head(x) for head, x in zip(self.heads, features)))
        points, strides = grid([(x.shape[-2], x.shape[-1]) for x in features], images.device)
        reach = torch.cat(distances, 1) * strides[:, None]
        boxes = torch.cat([points - reach[..., :2], points + reach[..., 2:]], -1)
        return Predictions(torch.cat(logits, 1), boxes, points, strides)


def grid(sizes: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the middles x, y [points, 2] of the cells of all feature maps in pixels, and their strides [points]."""
    points, strides = [], []
    for (height, width), stride in zip(sizes, STRIDES):
        ys, xs = (stride * (torch.arange(n, device=device) + 0.5) for n in (height, width))
        points.append(torch.stack([xs.repeat(height), ys.repeat_interleave(width)], 1))
        strides.append(torch.full((height * width,), float(stride), device=device))
    return torch.cat(points), torch.cat(strides)


def own_detector(name: str, classes: int) -> Detector:
    """Build a detector by a name of ``SIZES``, with random weights."""
    if name not in SIZES or classes < 1:
        raise RecipeError(f"detectors are {list(SIZES)} with one class or more, got {name!r} with {classes}")
    return Detector(SIZES[name], classes)


def _up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
