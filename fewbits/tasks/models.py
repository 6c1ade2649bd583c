"""Classification models: a small reference CNN, the CIFAR ResNets, and any torchvision or timm model by name.

Weights are never downloaded; they are read from a file that the user names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import RecipeError, nearest
from fewbits.tasks.weights import load_weights

CIFAR_DEPTHS = (20, 32, 44, 56, 110)


class ReferenceCNN(nn.Module):
    """Four conv-bn-relu layers, global average pooling, and a linear layer; about 33,000 parameters.

    Input [B, in_channels, H, W] of any size from 4x4 on; output logits [B, num_classes].
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: int = 16) -> None:
        super().__init__()
        channels = (in_channels, width, 2 * width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for i, stride in enumerate((1, 2, 1, 2)):
            layers.append(nn.Conv2d(channels[i], channels[i + 1], 3, stride, padding=1, bias=False))
            layers += [nn.BatchNorm2d(channels[i + 1]), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, num_classes]."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


class PaddedShortcut(nn.Module):
    """Shortcut "option A" of He et al. 2015, section 4.2: every second pixel, new channels zero."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.each_side = new_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C + new_channels, H / 2, W / 2]."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.each_side, self.each_side))


class BasicBlock(nn.Module):
    """conv-bn-relu-conv-bn plus shortcut, then relu (He et al. 2015, figure 5 left)."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Identity() if stride == 1 else PaddedShortcut(planes - in_planes)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, planes, H / stride, W / stride]."""
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        activated: Tensor = self.relu2(out + self.shortcut(x))
        return activated


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2015, section 4.2: three stages of (depth - 2) / 6 blocks, 16/32/64 wide.

    Input [B, in_channels, 32, 32] (any even size works); output logits [B, num_classes].
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise RecipeError(f"a CIFAR ResNet has a depth of 6n + 2 (8, 14, 20, ...), got {depth}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        blocks = (depth - 2) // 6
        self.layer1 = _stage(16, 16, 1, blocks)
        self.layer2 = _stage(16, 32, 2, blocks)
        self.layer3 = _stage(32, 64, 2, blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, num_classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(self.pool(x).flatten(1))
        return logits


def _stage(in_planes: int, planes: int, stride: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))


OWN_MODELS: dict[str, Callable[..., nn.Module]] = {
    "reference_cnn": ReferenceCNN,
    **{f"resnet{depth}": functools.partial(CifarResNet, depth) for depth in CIFAR_DEPTHS},
}


def build_model(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    pretrained_path: str | Path | None = None,
    pretrained_skip: Sequence[str] = (),
    **options: Any,
) -> nn.Module:
    """Build a classifier by name: a key of ``OWN_MODELS``, ``torchvision:NAME`` or ``timm:NAME``.

    pretrained_path: a checkpoint to load; pretrained_skip: patterns of its tensors to leave out, such as a
    head for other classes. options: further keyword arguments of the model. Raises RecipeError for an unknown
    name or option and for a package that is not installed, CheckpointError for weights that do not fit.
    """
    if num_classes < 2 or in_channels < 1:
        raise RecipeError(f"need num_classes >= 2 and in_channels >= 1, got {num_classes} and {in_channels}")
    if pretrained_skip and pretrained_path is None:
        raise RecipeError(f"pretrained_skip={list(pretrained_skip)} without pretrained_path; give both or neither")
    library, rest = name.split(":", 1) if ":" in name else ("", name)
    if library not in BUILDERS:
        raise RecipeError(f"unknown model library {library!r} in {name!r}; known: 'torchvision:NAME', 'timm:NAME'")
    try:
        model = BUILDERS[library](rest, num_classes, in_channels, options)
    except TypeError as error:
        raise RecipeError(f"the model {name!r} does not take the options {options}: {error}") from error
    if pretrained_path is not None:
        load_weights(model, pretrained_path, pretrained_skip)
    return model


def _own(name: str, num_classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    _check_known(name, OWN_MODELS, "fewbits' own models")
    return OWN_MODELS[name](num_classes=num_classes, in_channels=in_channels, **options)


def _torchvision(name: str, num_classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise RecipeError(f"torchvision:{name} needs torchvision: pip install torchvision") from error
    # Only the classifiers: a detector's constructor would download its backbone.
    _check_known(name, models.list_models(module=models), "torchvision's classifiers")
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if in_channels != 3:
        _widen_stem(model, in_channels)
    return model


def _timm(name: str, num_classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise RecipeError(f"timm:{name} needs timm: pip install 'fewbits[models]'") from error
    if not timm.is_model(name):
        _check_known(name, timm.list_models(), "timm's models")
    model: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **options
    )
    return model


BUILDERS = {"": _own, "torchvision": _torchvision, "timm": _timm}


def _check_known(name: str, known: Sequence[str] | dict[str, Any], what: str) -> None:
    if name not in known:
        hint = nearest(name, known) or f"; there are {', '.join(list(known)[:8])}, ..."
        raise RecipeError(f"{name!r} is not among {what}{hint}")


def _widen_stem(model: nn.Module, in_channels: int) -> None:
    """Replace the first convolution by one that reads ``in_channels`` instead of 3 channels."""
    name, old = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
