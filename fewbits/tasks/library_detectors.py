"""torchvision's detectors by name, with the interface of our own: SSD, SSDLite, RetinaNet, FCOS, Faster R-CNN.

Their resizing and normalising is passed by: images come as batches that are scaled and normalised already. Anchors and
the decoding of boxes are part of the module, so they are exported with it; suppression is not, except inside of the
two-stage detectors, which have no ONNX form here.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import DataError, RecipeError, nearest

LIBRARY = "torchvision:"
PASSED_BY = {  # options of torchvision that mean nothing here
    "backbone", "num_classes", "kwargs", "min_size", "max_size", "image_mean", "image_std", "size", "score_thresh",
    "nms_thresh", "detections_per_img", "topk_candidates",
}  # fmt: skip
MOST = 100  # detections of a two-stage detector


class LibraryDetector(nn.Module):
    """Images [B, 3, H, W] to boxes and scores [B, N, 4 + classes], or, given targets, to the loss; see ``Detector``.

    model: a detector of torchvision. background: its class 0 is the ground.
    """

    def __init__(self, model: Any, classes: int, background: bool) -> None:
        super().__init__()
        self.model, self.classes, self.background = model, classes, background

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        """See the class. Raises DataError where the loss of a two-stage detector is asked for in eval mode."""
        if targets is None:
            return self.outputs(images)
        losses = self.losses(images, [self._target(rows) for rows in targets])
        return torch.stack(list(losses.values())).sum()

    def outputs(self, images: Tensor) -> Tensor:
        """Return corners in pixels and scores in 0..1."""
        raise NotImplementedError

    def losses(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return torchvision's losses by name."""
        raise NotImplementedError

    def _target(self, rows: Tensor) -> dict[str, Tensor]:
        """Return rows [M, 5] of label and corners as torchvision has them."""
        rows = rows[rows[:, 0] >= 0]
        return {"labels": rows[:, 0].long() + int(self.background), "boxes": rows[:, 1:]}


class OneStage(LibraryDetector):
    """SSD, SSDLite, RetinaNet and FCOS."""

    def outputs(self, images: Tensor) -> Tensor:
        """See ``LibraryDetector``."""
        head, (anchors, *_), _ = self._run(images, 1)
        codes, logits = head["bbox_regression"], head["cls_logits"]
        if "bbox_ctrness" in head:
            boxes = self.model.box_coder.decode(codes, anchors)
            scores = (logits.sigmoid() * head["bbox_ctrness"].sigmoid()).sqrt()
        else:
            flat = self.model.box_coder.decode_single(codes.reshape(-1, 4), anchors.repeat(images.shape[0], 1))
            boxes = flat.reshape(codes.shape)
            scores = logits.softmax(-1)[..., 1:] if self.background else logits.sigmoid()
        return torch.cat([boxes, scores], -1)

    def losses(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """See ``LibraryDetector``."""
        head, anchors, features = self._run(images, len(images))
        given: list[Any] = [targets, head, anchors]
        if "bbox_ctrness" in head:  # FCOS has one anchor a point, and asks how many points a level has
            given.append([x.shape[-2] * x.shape[-1] for x in features])
        elif self.background:  # SSD wants to be told which anchor is for which object; RetinaNet finds it out
            given.append([self._match(t["boxes"], a) for t, a in zip(targets, anchors)])
        losses: dict[str, Tensor] = self.model.compute_loss(*given)
        return losses

    def _match(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Return the object of each anchor, int64 [anchors], negative where it has none."""
        from torchvision.ops import box_iou

        if not len(boxes):
            return torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
        matched: Tensor = self.model.proposal_matcher(box_iou(boxes, anchors))
        return matched

    def _run(self, images: Tensor, count: int) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
        """Return what the heads say, the anchors of ``count`` images, and the features."""
        features = list(self.model.backbone(images).values())
        return self.model.head(features), self.model.anchor_generator(_listed(images, count), features), features


class TwoStage(LibraryDetector):
    """Faster R-CNN: the best ``MOST`` detections, each with the score of its one class; rows of zeros fill up."""

    def outputs(self, images: Tensor) -> Tensor:
        """See ``LibraryDetector``."""
        listed = _listed(images, len(images))
        features = self.model.backbone(images)
        proposals, _ = self.model.rpn(listed, features)
        found, _ = self.model.roi_heads(features, proposals, listed.image_sizes)
        result = images.new_zeros(len(images), MOST, 4 + self.classes)
        for rows, one in zip(result, found):
            count = min(MOST, len(one["labels"]))
            rows[:count, :4] = one["boxes"][:count]
            rows[torch.arange(count), 3 + one["labels"][:count]] = one["scores"][:count]
        return result

    def losses(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """See ``LibraryDetector``."""
        if not self.training:
            raise DataError("a two-stage detector of torchvision has a loss in training mode only; call .train() first")
        listed = _listed(images, len(images))
        features = self.model.backbone(images)
        proposals, first = self.model.rpn(listed, features, targets)
        _, second = self.model.roi_heads(features, proposals, listed.image_sizes, targets)
        return {**first, **second}


def library_detector(name: str, classes: int, **options: Any) -> LibraryDetector:
    """Build ``torchvision:NAME`` with random weights. options: of torchvision's function.

    Raises RecipeError for an unknown name or option, and for one of what is passed by.
    """
    from torchvision.models import detection, get_model, list_models

    known = [n for n in list_models(module=detection) if not n.startswith(("mask", "keypoint"))]
    short = name.removeprefix(LIBRARY)
    if short not in known:
        raise RecipeError(f"{short!r} is not among torchvision's detectors{nearest(short, known)}; known: {known}")
    background = short.startswith(("ssd", "faster"))
    try:
        model = get_model(short, weights=None, weights_backbone=None, num_classes=classes + int(background), **options)
    except TypeError as error:
        raise RecipeError(f"the model {name!r} does not take the options {options}: {error}") from error
    taken = set(inspect.signature(type(model)).parameters) - PASSED_BY
    if set(options) - taken:  # torchvision itself takes any word here, and drops it
        raise RecipeError(f"the model {name!r} does not take the options {options}; known: {sorted(taken)}")
    return (TwoStage if short.startswith("faster") else OneStage)(model, classes, background)


def _listed(images: Tensor, count: int) -> Any:
    """Return images as torchvision's anchors and regions want them; ``count``: how many to make anchors for."""
    from torchvision.models.detection.image_list import ImageList

    size: Sequence[int] = images.shape[-2:]
    return ImageList(images, [(size[0], size[1])] * count)
