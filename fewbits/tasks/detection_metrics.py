"""From a detector's outputs to detections, COCO's metric of them, and whether two models detect the same."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import DataError
from fewbits.layers import in_eval
from fewbits.tasks.data import Batch
from fewbits.tasks.detection import DetectionExamples

LEAST_SCORE = 0.01
OVERLAP = 0.6  # IoU above which the weaker of two boxes of a class goes
MOST = 100  # detections an image, as in COCO
BEFORE = 1000  # of the best that are looked at, an image
SEEN = 0.25  # score from which on a detection is drawn, and must agree
MARGIN = 0.05  # by which the score of the other may be lower
CLOSE = 0.9  # IoU from which on two detections of a class are the same
STATS = ("map", "map50", "map75", "map_small", "map_medium", "map_large")  # the first six of pycocotools


@dataclass(frozen=True)
class Detections:
    """What was found on one image, best first: boxes [N, 4], corners in pixels; scores [N]; labels int64 [N]."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def above(self, score: float) -> Detections:
        """Return those of at least this score."""
        keep = self.scores >= score
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep])


@dataclass(frozen=True)
class Limits:
    """Which outputs become detections: those above a score, the best before and after suppression, an image."""

    score: float = LEAST_SCORE
    before: int = BEFORE
    most: int = MOST


USUAL = Limits()


def detections(outputs: Tensor, limits: Limits = USUAL) -> list[Detections]:
    """Return the detections of a batch of outputs [B, points, 4 + classes], after non-maximum suppression by class.

    Raises DataError for an output that is not finite.
    """
    if not bool(outputs.isfinite().all()):
        raise DataError("the detector's outputs are not finite; train it with a lower lr, or calibrate it again")
    return [_suppressed(image[:, :4].float(), image[:, 4:].float(), limits) for image in outputs]


def _suppressed(boxes: Tensor, scores: Tensor, limits: Limits) -> Detections:
    from torchvision.ops import batched_nms

    points, labels = (scores > limits.score).nonzero(as_tuple=True)
    best = scores[points, labels].sort(descending=True, stable=True).indices[: limits.before]
    points, labels = points[best], labels[best]
    kept = batched_nms(boxes[points], scores[points, labels], labels, OVERLAP)[: limits.most]
    return Detections(boxes[points[kept]], scores[points[kept], labels[kept]], labels[kept])


def predict(model: Callable[[Tensor], Tensor], examples: DetectionExamples, batch_size: int) -> Iterator[Batch]:
    """Yield (outputs [B, points, 4 + classes], targets) of all examples in order, on the CPU.

    model: a module, which runs in eval mode where its parameters are, or any callable. Raises DataError where the
    outputs are not those of a detector of the examples' classes.
    """
    device = next((p.device for p in model.parameters()), "cpu") if isinstance(model, nn.Module) else "cpu"
    width = 4 + len(examples.classes)
    for images, targets in examples.batches(batch_size):
        with in_eval(model) if isinstance(model, nn.Module) else contextlib.nullcontext(), torch.no_grad():
            outputs = model(images.to(device)).to("cpu", torch.float32)
        if outputs.ndim != 3 or outputs.shape[-1] != width:
            raise DataError(f"expected outputs [batch, points, {width}] of a detector, got {list(outputs.shape)}")
        yield outputs, targets


def score(outputs: Iterable[Tensor], examples: DetectionExamples) -> dict[str, Any]:
    """Return COCO's average precision of outputs in the order of the examples, in percent.

    map: mean over IoU 0.5 to 0.95 and classes; map50, map75: at one IoU; map_small, map_medium, map_large: of objects
    below 32^2, below 96^2 and above, in pixels of the image before scaling; None where there are none. per_class: map
    by the name of the class.
    """
    found = [found for batch in outputs for found in detections(batch)]
    return coco_map(found, examples)


def coco_map(found: Sequence[Detections], examples: DetectionExamples) -> dict[str, Any]:
    """Return the metrics of ``score`` for detections on all examples, in pixels of the scaled images."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth, results = _coco(examples, _truth(examples)), _coco(examples, _results(found, examples))
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    by_class = torch.from_numpy(evaluation.eval["precision"])[:, :, :, 0, -1]  # IoU, recall, class; all sizes, 100
    per_class = {name: _mean(by_class[:, :, i]) for i, name in enumerate(examples.classes)}
    return {**{name: _percent(value) for name, value in zip(STATS, evaluation.stats)}, "per_class": per_class}


def same_detections(got: Tensor, want: Tensor) -> Tensor:
    """Tell for each detection in two batches of outputs whether the other output has it, too, bool [detections].

    Those of a score of ``SEEN`` or more count, of both outputs. The other has one where it has one of the same class
    with an IoU of ``CLOSE``, and a score at most ``MARGIN`` below. An image on which neither sees anything agrees.
    """
    found = []
    for one, other in zip(detections(got), detections(want)):
        pairs = _pairs(one, other)
        each = pairs.any(1)[one.scores >= SEEN], pairs.any(0)[other.scores >= SEEN]
        found.append(torch.cat(each) if sum(map(len, each)) else torch.ones(1, dtype=torch.bool))
    return torch.cat(found)


def corner_differences(got: Tensor, want: Tensor) -> Tensor:
    """Return by how many pixels the corners of detections differ that two batches of outputs share, [detections].

    Of each detection of ``got`` with a score of ``SEEN`` or more that ``want`` has, too: the largest of its four
    differences from the nearest one. Where activations are rounded to codes, the last digit of a sum may move one to
    the next code, and with it the boxes around by some hundredths of a pixel, now and then by one.
    """
    found = []
    for one, other in zip(detections(got), detections(want)):
        apart = (one.boxes[:, None] - other.boxes[None]).abs().amax(-1).masked_fill(~_pairs(one, other), torch.inf)
        nearest = apart.amin(1) if len(other.labels) else torch.full((len(one.labels),), torch.inf)
        found.append(nearest[(one.scores >= SEEN) & nearest.isfinite()])
    return torch.cat(found)


def _pairs(one: Detections, other: Detections) -> Tensor:
    """Tell which detections are the same, bool [of one, of the other]."""
    from torchvision.ops import box_iou

    near: Tensor = box_iou(one.boxes, other.boxes) >= CLOSE
    alike = (one.scores[:, None] >= SEEN - MARGIN) & (other.scores[None] >= SEEN - MARGIN)
    return near & alike & (one.labels[:, None] == other.labels[None])


def _coco(examples: DetectionExamples, annotations: list[dict[str, Any]]) -> Any:
    from pycocotools.coco import COCO

    coco = COCO()
    sizes = enumerate(examples.sizes.tolist())
    coco.dataset = {
        "images": [{"id": i, "height": height, "width": width} for i, (height, width) in sizes],
        "categories": [{"id": i, "name": name} for i, name in enumerate(examples.classes)],
        "annotations": [{"id": i, **a} for i, a in enumerate(annotations, 1)],
    }
    coco.createIndex()
    return coco


def _truth(examples: DetectionExamples) -> list[dict[str, Any]]:
    return [
        {**_annotation(image, corners, label), "iscrowd": int(crowd), "area": area}
        for image, o in enumerate(examples.objects)
        for corners, label, crowd, area in zip(o.boxes.tolist(), o.labels.tolist(), o.crowd.tolist(), o.areas.tolist())
    ]


def on_originals(found: Iterable[Detections], examples: DetectionExamples) -> Iterator[Detections]:
    """Yield the detections on each example in pixels of the image before scaling, cut off at its borders.

    Raises DataError where there are not as many as examples.
    """
    scales, limits, number = examples.scales, examples.sizes.flip(1).repeat(1, 2).float(), 0
    for number, one in enumerate(found, 1):
        if number > len(examples):
            break
        boxes = torch.minimum((one.boxes * scales[number - 1]).clamp(min=0), limits[number - 1])
        yield dataclasses.replace(one, boxes=boxes)
    if number != len(examples):
        given = f"more than {len(examples)}" if number > len(examples) else number
        raise DataError(f"got the detections of {given} images for {len(examples)} examples")


def _results(found: Sequence[Detections], examples: DetectionExamples) -> list[dict[str, Any]]:
    results = []
    for image, one in enumerate(on_originals(found, examples)):
        for corners, label, value in zip(one.boxes.tolist(), one.labels.tolist(), one.scores.tolist()):
            given = _annotation(image, corners, label)
            results.append({**given, "score": value, "area": given["bbox"][2] * given["bbox"][3], "iscrowd": 0})
    return results


def _annotation(image: int, corners: Sequence[float], label: int) -> dict[str, Any]:
    x1, y1, x2, y2 = corners
    return {"image_id": image, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1]}


def _percent(value: float) -> float | None:
    return None if value < 0 else 100 * float(value)  # pycocotools says -1 where there is nothing to find


def _mean(precision: Tensor) -> float | None:
    known = precision[precision >= 0]
    return 100 * float(known.mean()) if len(known) else None
