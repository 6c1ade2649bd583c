"""Segmentation models by name: our U-Nets, and those of torchvision."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewbits.errors import RecipeError, nearest
from fewbits.tasks.unet import SIZES, UNet
from fewbits.tasks.weights import load_weights

LIBRARY = "torchvision:"
FAMILIES = ("unet_", *(f"{LIBRARY}{family}" for family in ("deeplabv3", "fcn", "lraspp")))
OWN_SEGMENTERS: dict[str, Callable[..., nn.Module]] = {
    name: functools.partial(UNet, widths=widths) for name, widths in SIZES.items()
}


def main_output(model: nn.Module, args: Any, outputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of a model of torchvision. A hook, since it leaves the names of tensors as files have them."""
    return outputs["out"]


def build_segmenter(
    name: str,
    num_classes: int,
    pretrained_path: str | Path | None = None,
    pretrained_skip: Sequence[str] = (),
    **options: Any,
) -> nn.Module:
    """Build a model from images [B, 3, H, W] to logits [B, num_classes, H, W].

    name: a key of ``OWN_SEGMENTERS`` (options: ``fusion``, ``widths``), or ``torchvision:NAME``, such as
    lraspp_mobilenet_v3_large or deeplabv3_resnet50. pretrained_path: a checkpoint to load; pretrained_skip: patterns of
    its tensors to leave out. Raises RecipeError for an unknown name or option, CheckpointError for weights that do not
    fit.
    """
    if num_classes < 2:
        raise RecipeError(f"segmentation needs two classes or more, got {num_classes}")
    if pretrained_skip and pretrained_path is None:
        raise RecipeError(f"pretrained_skip={list(pretrained_skip)} without pretrained_path; give both or neither")
    try:
        model = _library(name, num_classes, options) if name.startswith(LIBRARY) else _own(name, num_classes, options)
    except TypeError as error:
        raise RecipeError(f"the model {name!r} does not take the options {options}: {error}") from error
    if pretrained_path is not None:
        load_weights(model, pretrained_path, pretrained_skip)
    return model


def is_segmenter(name: str) -> bool:
    """Tell whether a model name is meant for ``build_segmenter``."""
    return name.startswith(FAMILIES)


def _own(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    _check_known(name, list(OWN_SEGMENTERS), "fewbits' own segmenters")
    return OWN_SEGMENTERS[name](num_classes, **options)


def _library(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise RecipeError(f"{name} needs torchvision: pip install torchvision") from error
    short = name.removeprefix(LIBRARY)
    _check_known(short, models.list_models(module=models.segmentation), "torchvision's segmenters")
    if "aux_loss" in options:
        raise RecipeError(f"{name}: only the main output is trained, so aux_loss would change nothing; leave it out")
    # without weights_backbone=None it would be downloaded
    model: nn.Module = models.get_model(short, weights=None, weights_backbone=None, num_classes=num_classes, **options)
    model.register_forward_hook(main_output)
    return model


def _check_known(name: str, known: Sequence[str], what: str) -> None:
    if name not in known:
        hint = nearest(name, known) or f"; there are {', '.join(known)}"
        raise RecipeError(f"{name!r} is not among {what}{hint}")
