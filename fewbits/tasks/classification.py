"""Classification: loss, predictions, and metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import DataError
from fewbits.tasks.data import Batch, LabelledImages

Classifier = Callable[[Tensor], Tensor]


def cross_entropy(model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy of ``model`` on (images [B, C, H, W], labels [B]), a scalar."""
    images, labels = batch
    return F.cross_entropy(_logits(model, images), labels, label_smoothing=label_smoothing)


def predict(
    model: Classifier,
    examples: LabelledImages,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the logits of all examples in order, float32 [N, classes], on the CPU.

    model: a module, or any callable from a float32 batch [B, C, H, W] to logits [B, classes]. A module runs
    in eval mode; the mode of each submodule is restored. device: where batches go; None: where the module's
    parameters are, else the CPU. Raises DataError where the outputs are not logits of the examples' classes.
    """
    target = _device_of(model) if device is None else torch.device(device)
    outputs = []
    with _eval_mode(model), torch.no_grad():
        for images, _ in examples.batches(batch_size):
            outputs.append(_logits(model, images.to(target)).to("cpu", torch.float32))
    logits = torch.cat(outputs)
    if logits.shape != (len(examples), len(examples.classes)):
        raise DataError(
            f"the model returned logits {list(logits.shape)} for {len(examples)} examples of "
            f"{len(examples.classes)} classes; build it with num_classes={len(examples.classes)}"
        )
    return logits


def evaluate(
    model: Classifier,
    examples: LabelledImages,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Return ``top1``, ``top5`` (percent), ``loss`` (mean cross entropy) and ``confusion`` of ``model``.

    Arguments and errors as for ``predict``; the metrics are those of ``score``.
    """
    return score(predict(model, examples, batch_size, device), examples.labels)


def score(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Score logits [N, K] against labels int64 [N].

    top1, top5: percent, 0..100 (with K < 5 classes, top5 is top-K: always 100). confusion: K lists of K
    counts; a row is a true class, a column a predicted one. Raises DataError for NaN among the logits.
    """
    broken = logits.isnan().any(1).nonzero()
    if len(broken):
        raise DataError(f"the model returned NaN for {len(broken)} examples, the first is {int(broken[0])}")
    count, classes = logits.shape
    predicted = logits.argmax(1)
    among_five = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
    confusion = torch.bincount(labels * classes + predicted, minlength=classes * classes)
    return {
        "top1": 100 * int((predicted == labels).sum()) / count,
        "top5": 100 * int(among_five.sum()) / count,
        "loss": float(F.cross_entropy(logits, labels)),
        "confusion": confusion.reshape(classes, classes).tolist(),
    }


def _logits(model: Classifier, images: Tensor) -> Tensor:
    """Run the model; where it fails, tell whether the number of channels is why."""
    try:
        logits = model(images)
    except RuntimeError as error:
        expected = _stem_channels(model)
        if expected in (None, images.shape[1]):
            raise
        raise DataError(
            f"the images have {images.shape[1]} channels, the model reads {expected}; build it with "
            f"in_channels={images.shape[1]} or load other images"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"expected logits [batch, classes] from the model, got {found}; wrap it to return only logits")
    return logits


def _stem_channels(model: Classifier) -> int | None:
    """Return ``in_channels`` of the first layer that has it, or None."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = (getattr(m, "in_channels", None) for m in modules)
    return next((channels for channels in found if isinstance(channels, int)), None)


def _device_of(model: Classifier) -> torch.device:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))


@contextlib.contextmanager
def _eval_mode(model: Classifier) -> Iterator[None]:
    """Put a module in eval mode, and each submodule back as it was: some may be frozen in eval mode."""
    modes = {m: m.training for m in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        if isinstance(model, nn.Module):
            model.eval()
        yield
    finally:
        if isinstance(model, nn.Module):
            model.train(modes[model])
        for module, training in modes.items():
            module.training = training
