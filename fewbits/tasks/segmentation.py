"""Segmentation: losses, answers and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import DataError
from fewbits.layers import in_eval
from fewbits.losses.dice import soft_dice
from fewbits.tasks.boundary import boundary_f1
from fewbits.tasks.data import Batch
from fewbits.tasks.masks import IGNORE
from fewbits.tasks.segmented import SegmentedImages

Segmenter = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class PixelLoss:
    """``cross_entropy`` times the mean cross entropy of the pixels, plus ``dice`` times the soft Dice loss.

    class_weights: float [K], of the cross entropy, None: all 1. ground: the class that Dice leaves out. Pixels that are
    IGNORE do not count. Raises DataError where both parts are zero.
    """

    cross_entropy: float = 1.0
    dice: float = 0.0
    class_weights: Tensor | None = None
    ground: int | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if min(self.cross_entropy, self.dice) < 0 or self.cross_entropy + self.dice == 0:
            raise DataError(
                f"a loss needs cross_entropy and dice of at least 0, not both 0; got {self.cross_entropy}, {self.dice}"
            )

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss on (images [B, C, H, W], masks int64 [B, H, W]), a scalar. Raises DataError for bad masks."""
        images, masks = batch
        logits = _checked(model(images), masks).float()
        loss = logits.sum() * 0  # a batch of nothing but IGNORE has no loss, and no gradient
        counted = (masks != IGNORE).any()
        if self.cross_entropy and counted:
            weights = None if self.class_weights is None else self.class_weights.to(logits)
            smoothing = self.label_smoothing
            entropy = F.cross_entropy(logits, masks, weights, ignore_index=IGNORE, label_smoothing=smoothing)
            loss = loss + self.cross_entropy * entropy
        if self.dice:
            loss = loss + self.dice * soft_dice(logits, masks, ignore=IGNORE, ground=self.ground)
        return loss


def balanced_weights(examples: SegmentedImages) -> Tensor:
    """Return a weight for each class, float [K]: median frequency over its own (Eigen and Fergus 2015, section 4.3.2).

    The frequency of a class is its share of the pixels of those images that have it. Raises DataError for a class that
    no image has.
    """
    classes = len(examples.classes)
    pixels, of = torch.zeros(classes, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
    for read in examples.reads:
        counts = torch.bincount(read()[1].flatten().long(), minlength=IGNORE + 1)[:classes]
        pixels, of = pixels + counts, of + counts.sum() * (counts > 0)
    if not pixels.all():
        name = examples.classes[int((pixels == 0).nonzero()[0])]
        raise DataError(f"no training image has the class {name!r}, so it has no balanced weight; give class_weights")
    frequency = pixels / of
    return (frequency.median() / frequency).float()


def answers(
    model: Segmenter, examples: SegmentedImages, batch_size: int, device: torch.device | str | None = None
) -> Iterator[Batch]:
    """Yield (logits float32 [B, K, H, W], masks int64 [B, H, W]) of all examples in order, on the CPU.

    model: a module, which runs in eval mode meanwhile, or any callable. device: where batches go; None: where the
    module's parameters are, else the CPU. Raises DataError where the outputs are not logits of the examples' classes.
    """
    module = model if isinstance(model, nn.Module) else nn.Module()
    found = next((p.device for p in module.parameters()), torch.device("cpu"))
    for images, masks in examples.batches(batch_size):
        with in_eval(module), torch.no_grad():  # not around the yield: the caller may train meanwhile
            logits = _checked(model(images.to(device or found)), masks, len(examples.classes))
        yield logits.to("cpu", torch.float32), masks


def score(pairs: Iterable[Batch], ground: int | None = None, tolerance: int = 2) -> dict[str, Any]:
    """Score pairs of logits [B, K, H, W] and masks int64 [B, H, W]; percent, where nothing else is said.

    miou: mean over classes of intersection over union, of all pixels together. dice: mean over classes of 2 TP /
    (2 TP + FP + FN), of all pixels together, and dice_images, of each image alone and then averaged; both without the
    class ``ground``. boundary_f1: mean over images of the mean over classes, ``tolerance`` in pixels. pixel_accuracy:
    right pixels. loss: mean cross entropy of a pixel. confusion: counts of pixels, a row is a true class, a column a
    predicted one. Pixels that are IGNORE count nowhere, and a class that neither mask nor answer has in no mean; where
    nothing is left of one it is NaN. Raises DataError for NaN among the logits, and where there is no pair.
    """
    nats, confusions, outlined, seen = 0.0, list[Tensor](), list[float](), 0
    for logits, masks in pairs:
        if logits.isnan().any():
            raise DataError(f"the model returned NaN among the logits of images {seen}..{seen + len(logits) - 1}")
        predicted, classes = logits.argmax(1), logits.shape[1]
        nats += float(F.cross_entropy(logits, masks, ignore_index=IGNORE, reduction="sum"))
        confusions += [confusion(*pair, classes) for pair in zip(predicted, masks)]
        outlined += [boundary_f1(*pair, tolerance) for pair in zip(predicted, masks)]
        seen += len(masks)
    if not seen:
        raise DataError("there are no images to score")
    of_images = torch.stack(confusions)
    total = of_images.sum(0)
    kept = [c for c in range(len(total)) if c != ground]
    return {
        "miou": 100 * float(_overlap(total, 1).nanmean()),
        "dice": 100 * float(_overlap(total, 2)[kept].nanmean()),
        "dice_images": 100 * float(_overlap(of_images, 2)[:, kept].nanmean(1).nanmean()),
        "boundary_f1": 100 * float(torch.tensor(outlined).nanmean()),
        "pixel_accuracy": 100 * float(total.diagonal().sum() / total.sum()),
        "loss": nats / max(1, int(total.sum())),
        "confusion": total.tolist(),
    }


def confusion(answer: Tensor, mask: Tensor, classes: int) -> Tensor:
    """Return counts int64 [K, K] of the pixels of one image: rows are true classes, columns predicted ones."""
    valid = mask != IGNORE
    return torch.bincount(mask[valid] * classes + answer[valid], minlength=classes**2).reshape(classes, classes)


def _overlap(confusion: Tensor, factor: int) -> Tensor:
    """Return f TP / (f TP + FP + FN), [..., K], of confusions [..., K, K]: f = 1 is IoU, f = 2 Dice; NaN for 0 / 0."""
    hits = confusion.diagonal(dim1=-2, dim2=-1).double()
    wrong = confusion.sum(-1) + confusion.sum(-2) - 2 * hits
    return factor * hits / (factor * hits + wrong)


def _checked(logits: Any, masks: Tensor, classes: int | None = None) -> Tensor:
    """Return logits that fit the masks, and masks that fit the logits."""
    if not isinstance(logits, Tensor) or logits.ndim != 4 or classes not in (None, logits.shape[1]):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(
            f"expected logits [batch, {classes or 'classes'}, H, W] from the model, got {found}; build it with "
            "num_classes= that of the data"
        )
    if logits.shape[2:] != masks.shape[1:] or len(logits) != len(masks):
        raise DataError(
            f"logits {list(logits.shape)} do not fit masks {list(masks.shape)}: a mask must be of its image's size"
        )
    wrong = ((masks < 0) | (masks >= logits.shape[1])) & (masks != IGNORE)
    if wrong.any():
        first = int(masks[wrong][0])
        raise DataError(
            f"a mask has the label {first}, but the model tells {logits.shape[1]} classes apart, "
            f"0..{logits.shape[1] - 1}; {IGNORE} is for pixels that do not count"
        )
    return logits


def check_weights(weights: Sequence[float], classes: Sequence[str]) -> Tensor:
    """Return weights as float [K]. Raises DataError unless there is one for each class, none negative, one not zero."""
    if len(weights) != len(classes) or min(weights) < 0 or not any(weights):
        raise DataError(f"class_weights {list(weights)}: give {len(classes)} numbers of at least 0, for {classes}")
    return torch.tensor(weights, dtype=torch.float32)
