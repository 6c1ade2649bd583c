"""Average precision for many classes: LVIS' federated rule, and Fixed AP.

LVIS (Gupta et al. 2019) knows of each image only of some classes; others do not count there. Fixed AP (Dave et al.,
Evaluating Large-Vocabulary Object Detectors: The Devil is in the Details, 2021) limits the detections of a class over
the data set instead of those of an image, for which classes would compete.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.errors import DataError, nearest
from fewbits.tasks.detection import DetectionExamples
from fewbits.tasks.detection_metrics import Detections, Limits, detections, on_originals
from fewbits.tasks.open_vocabulary.truth import Truth, Verified
from fewbits.tasks.open_vocabulary.words import Groups

A_CLASS = 10_000  # detections of a class over the data set: its best
UNLIMITED = Limits(score=0.001, before=30_000, most=30_000)  # what one image may take of memory, no part of the metric
THRESHOLDS = torch.from_numpy(np.linspace(0.5, 0.95, 10)).clamp(max=1 - 1e-10)  # of the IoU, as in pycocotools
RECALLS = torch.from_numpy(np.linspace(0.0, 1.0, 101))
CHUNK = 2_000_000  # detections that wait until the worst of them go
Marked = dict[int, tuple[Tensor, Tensor]]  # by image: boxes [G, 4] and whether they are crowds [G], of one class


@dataclass(frozen=True)
class _Pool:
    """Detections of several images: image [N], label [N], score [N] and corners [N, 4]."""

    images: Tensor
    labels: Tensor
    scores: Tensor
    boxes: Tensor

    def take(self, rows: Tensor) -> _Pool:
        return _Pool(self.images[rows], self.labels[rows], self.scores[rows], self.boxes[rows])


def score_fixed(
    outputs: Iterable[Tensor],
    examples: DetectionExamples,
    groups: Groups | None = None,
    verified: Mapping[str, Verified] | None = None,
) -> dict[str, Any]:
    """Return ``fixed_ap`` of a detector's outputs [batch, points, 4 + classes] in the order of the examples."""
    found = (found for batch in outputs for found in detections(batch, UNLIMITED))
    return fixed_ap(on_originals(found, examples), Truth.of(examples, verified), groups)


def fixed_ap(
    found: Iterable[Detections], truth: Truth, groups: Groups | None = None, limit: int = A_CLASS
) -> dict[str, Any]:
    """Return the average precision in percent of detections on each image, in pixels as those of ``truth``.

    map: mean over IoU 0.5 to 0.95 and the classes of which there are objects; map50, map75: at one IoU. per_class: map
    by class, None where there are no objects. groups: mean of per_class by group. limit: how many of the best
    detections of a class count, over all images. A detection counts where its class is on the image or is verified to
    be absent; a wrong one does not count where not all objects of its class are marked. Crowds are as in COCO.
    Raises DataError where images or labels do not fit.
    """
    best = _best(found, truth, limit)
    counts, partial = truth.looked_for()
    marked = _marked(truth)
    rows = torch.split(torch.arange(len(best.labels)), torch.bincount(best.labels, minlength=len(marked)).tolist())
    precisions = dict[str, Tensor | None]()
    for label, name in enumerate(truth.classes):
        mine = best.take(rows[label])
        mine = mine.take(counts[mine.images, label])
        precisions[name] = _precision(mine.images, mine.boxes.double(), marked[label], partial[:, label])
    return _summary(precisions, groups or {})


def group_means(per_class: Mapping[str, float | None], groups: Groups) -> dict[str, float | None]:
    """Return the mean of each group of classes, over those that have a value; None where none has.

    Raises DataError for a class that has no entry.
    """
    means = dict[str, float | None]()
    for group, names in groups.items():
        for name in names:
            if name not in per_class:
                raise DataError(f"the class {name!r} of the group {group!r} is unknown{nearest(name, per_class)}")
        means[group] = _mean([value for name in names if (value := per_class[name]) is not None])
    return means


def _summary(precisions: Mapping[str, Tensor | None], groups: Groups) -> dict[str, Any]:
    known = [precision for precision in precisions.values() if precision is not None]
    at = {"map": slice(None), "map50": slice(0, 1), "map75": slice(5, 6)}
    per_class = {name: None if p is None else 100 * float(p.mean()) for name, p in precisions.items()}
    return {
        **{name: _mean([100 * float(precision[part].mean()) for precision in known]) for name, part in at.items()},
        "per_class": per_class,
        "groups": group_means(per_class, groups),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _best(found: Iterable[Detections], truth: Truth, limit: int) -> _Pool:
    """Return the ``limit`` best detections of each class, by class and then by score; of equal ones the first.

    Raises DataError where images or labels do not fit. What is known not to be among the best goes early.
    """
    nothing = torch.zeros(0, dtype=torch.int64)
    pool = _Pool(nothing, nothing, torch.zeros(0), torch.zeros(0, 4))
    waiting, number = list[_Pool](), 0
    for number, one in enumerate(found, 1):
        _check(one, truth)
        waiting.append(_Pool(torch.full_like(one.labels, number - 1), one.labels, one.scores, one.boxes))
        if sum(len(w.labels) for w in waiting) > CHUNK:
            pool, waiting = _merged([pool, *waiting], limit), []
    if number != len(truth.names) or not number:
        raise DataError(f"got the detections of {number} images for the objects of {len(truth.names)}")
    return _merged([pool, *waiting], limit)


def _check(one: Detections, truth: Truth) -> None:
    wrong = one.labels[(one.labels < 0) | (one.labels >= len(truth.classes))]
    if len(wrong):
        raise DataError(f"a detection has the label {int(wrong[0])}, outside of 0..{len(truth.classes) - 1}")
    if not bool(one.scores.isfinite().all()):
        raise DataError("scores of detections are not finite")


def _merged(pools: Sequence[_Pool], limit: int) -> _Pool:
    fields = [[getattr(pool, field.name) for pool in pools] for field in dataclasses.fields(_Pool)]
    pool = _Pool(*map(torch.cat, fields))
    order = pool.scores.sort(descending=True, stable=True).indices
    labels, by_label = pool.labels[order].sort(stable=True)
    rank = torch.arange(len(labels)) - torch.searchsorted(labels, labels)  # within the class
    return pool.take(order[by_label][rank < limit])


def _marked(truth: Truth) -> list[Marked]:
    """Return the objects of each class by image."""
    marked: list[Marked] = [{} for _ in truth.classes]
    for image, objects in enumerate(truth.objects):
        for label in set(objects.labels.tolist()):
            rows = objects.labels == label
            marked[label][image] = objects.boxes[rows].double(), objects.crowd[rows]
    return marked


def _precision(images: Tensor, boxes: Tensor, marked: Marked, partial: Tensor) -> Tensor | None:
    """Return the average precision [thresholds] of one class, 0..1; None where there are no objects.

    images [N], boxes [N, 4]: the detections, best first. partial: bool [images], where wrong ones do not count.
    """
    objects = sum(int((~crowd).sum()) for _, crowd in marked.values())
    if not objects:
        return None
    right = torch.zeros(len(THRESHOLDS), len(images), dtype=torch.bool)
    ignored = partial[images].repeat(len(THRESHOLDS), 1)
    for image, (corners, crowd) in marked.items():
        rows = (images == image).nonzero()[:, 0]
        right[:, rows] = _matches(boxes[rows], corners[~crowd])
        ignored[:, rows] |= _within(boxes[rows], corners[crowd])
    return _interpolated(right, ~right & ~ignored, objects)


def _matches(boxes: Tensor, objects: Tensor) -> Tensor:
    """Tell which boxes [N, 4], best first, take an object that is still free, bool [thresholds, N].

    A box takes the one of the highest IoU, the last of several equal ones, as in pycocotools.
    """
    from torchvision.ops import box_iou

    overlaps: Tensor = box_iou(boxes, objects)
    matched = torch.zeros(len(THRESHOLDS), len(boxes), dtype=torch.bool)
    free = torch.ones(len(THRESHOLDS), len(objects), dtype=torch.bool)
    for row in (overlaps >= THRESHOLDS[0]).any(1).nonzero()[:, 0].tolist():  # most boxes are near no object
        fits = free & (overlaps[row] >= THRESHOLDS[:, None])
        taken = torch.where(fits, overlaps[row], -1.0).flip(1).argmax(1)
        matched[:, row] = fits.any(1)
        free[matched[:, row], len(objects) - 1 - taken[matched[:, row]]] = False
    return matched


def _within(boxes: Tensor, crowds: Tensor) -> Tensor:
    """Tell which boxes [N, 4] lie in a crowd to a part of each threshold, bool [thresholds, N]."""
    shared = torch.minimum(boxes[:, None, 2:], crowds[:, 2:]) - torch.maximum(boxes[:, None, :2], crowds[:, :2])
    parts = shared.clamp(min=0).prod(2) / (boxes[:, 2:] - boxes[:, :2]).prod(1, keepdim=True)
    return (parts >= THRESHOLDS[:, None, None]).any(2)


def _interpolated(right: Tensor, wrong: Tensor, objects: int) -> Tensor:
    """Return the mean over 101 recalls of the best precision from there on, [thresholds] in 0..1.

    right, wrong: bool [thresholds, N], of detections with the best first.
    """
    hits, misses = right.cumsum(1).double(), wrong.cumsum(1).double()
    precision = (hits / (hits + misses).clamp(min=1)).flip(1).cummax(1).values.flip(1) if hits.shape[1] else hits
    reached = torch.searchsorted(hits / objects, RECALLS.expand(len(hits), -1).contiguous())
    return torch.cat([precision, torch.zeros(len(hits), 1)], 1).gather(1, reached).mean(1)
