from __future__ import annotations

import contextlib
import dataclasses
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits.errors import DataError
from fewbits.tasks.detection import DetectionExamples, scene_examples
from fewbits.tasks.detection_metrics import (
    Detections,
    coco_map,
    corner_differences,
    detections,
    predict,
    same_detections,
    score,
)
from fewbits.tasks.scenes import make_scenes


def examples(count: int = 12) -> DetectionExamples:
    """Scenes of 64 pixels that were twice as large, of which one object in all is a crowd."""
    data = scene_examples(make_scenes("test", count, size=64))
    sizes, objects = data.sizes * 2, []
    for given in data.objects:
        objects.append(dataclasses.replace(given, boxes=given.boxes * 2, areas=given.areas * 4))
    crowd = objects[0].crowd.clone()
    crowd[0] = True
    objects[0] = dataclasses.replace(objects[0], crowd=crowd)
    return dataclasses.replace(data, objects=tuple(objects), sizes=sizes)


def noisy(data: DetectionExamples, noise: float = 0.7) -> list[Detections]:
    """Return the objects with their borders and classes a little off, and some that are not there."""
    found = []
    for objects, scale in zip(data.objects, data.scales):
        boxes = objects.boxes / scale
        boxes = torch.cat([boxes + noise * torch.randn(boxes.shape), boxes + 12])
        labels = objects.labels.repeat(2)
        labels = torch.where(torch.rand(len(labels)) < 0.2, (labels + 1) % 10, labels)
        found.append(Detections(boxes, torch.rand(len(labels)), labels))
    return found


def directly(data: DetectionExamples, found: list[Detections]) -> Any:
    """Return pycocotools' own evaluation, from plain lists and with its own reader of results."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations, results = [], []
    for image, (objects, one) in enumerate(zip(data.objects, found)):
        for box, label, crowd, area in zip(objects.boxes, objects.labels, objects.crowd, objects.areas):
            x1, y1, x2, y2 = box.tolist()
            entry = {"id": len(annotations) + 1, "image_id": image, "category_id": int(label), "iscrowd": int(crowd)}
            annotations.append({**entry, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": float(area)})
        for box, label, value in zip(one.boxes, one.labels, one.scores):
            x1, y1, x2, y2 = (2 * box).clamp(0, 128).tolist()
            entry = {"image_id": image, "category_id": int(label), "score": float(value)}
            results.append({**entry, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i, "height": 128, "width": 128} for i in range(len(data))],
            "categories": [{"id": i, "name": name} for i, name in enumerate(data.classes)],
            "annotations": annotations,
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
            step()
    return evaluation


def test_it_equals_pycocotools_on_the_same_detections() -> None:
    data = examples()
    found = noisy(data)
    ours, theirs = coco_map(found, data), directly(data, found)
    names = ("map", "map50", "map75", "map_small", "map_medium", "map_large")
    for name, value in zip(names, theirs.stats):
        assert ours[name] == (None if value < 0 else pytest.approx(100 * value, abs=1e-9))
    assert 10 < ours["map"] < 90 and ours["map_large"] is None
    precision = theirs.eval["precision"][:, :, :, 0, 2]
    for i, name in enumerate(data.classes):
        known = precision[:, :, i][precision[:, :, i] > -1]
        assert ours["per_class"][name] == (pytest.approx(100 * known.mean()) if known.size else None)


def test_the_truth_scores_full_marks_and_nothing_none() -> None:
    data = examples()
    perfect = [Detections(o.boxes / s, torch.ones(len(o.labels)), o.labels) for o, s in zip(data.objects, data.scales)]
    assert coco_map(perfect, data)["map"] == pytest.approx(100)
    nothing = Detections(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.int64))
    assert coco_map([nothing] * len(data), data)["map"] == 0
    with pytest.raises(DataError, match="1 images for 12"):
        coco_map([nothing], data)


def outputs(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor([rows])


def test_suppression_is_by_class_and_drops_weak_scores() -> None:
    box, near, far = (0, 0, 10, 10), (1, 0, 11, 10), (50, 50, 60, 60)
    (found,) = detections(outputs((*box, 0.9, 0.0), (*near, 0.8, 0.7), (*far, 0.005, 0.02)))
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.02]) and found.labels.tolist() == [0, 1, 1]
    assert found.boxes[:, 0].tolist() == [0, 1, 50] and len(found.above(0.5).labels) == 2
    with pytest.raises(DataError, match="not finite"):
        detections(outputs((*box, float("nan"), 0.0)))


BOX, FAR = (0, 0, 10, 10), (50, 50, 60, 60)


@pytest.mark.parametrize(
    ("other", "count", "agreeing"),
    [
        ([(0, 0, 10, 10.9, 0.8, 0.0), (*FAR, 0.0, 0.9)], 4, 4),  # IoU 0.92
        ([(0, 0, 10, 11.2, 0.9, 0.0), (*FAR, 0.0, 0.9)], 4, 2),  # IoU 0.89
        ([(*BOX, 0.0, 0.9), (*FAR, 0.0, 0.9)], 4, 2),  # another class
        ([(*BOX, 0.9, 0.0)], 3, 2),
        ([(*BOX, 0.9, 0.0), (*FAR, 0.0, 0.24)], 3, 3),  # its score is only a little lower
        ([(*BOX, 0.9, 0.0), (*FAR, 0.0, 0.19)], 3, 2),
        ([(*BOX, 0.9, 0.0), (*FAR, 0.0, 0.9), (0, 50, 9, 60, 0.0, 0.9)], 5, 4),
    ],
)
def test_detections_agree_in_class_and_place(other: list[Any], count: int, agreeing: int) -> None:
    want = outputs((*BOX, 0.9, 0.0), (*FAR, 0.0, 0.26))
    for same in (same_detections(outputs(*other), want), same_detections(want, outputs(*other))):
        assert (len(same), int(same.sum())) == (count, agreeing)


def test_differences_are_those_of_shared_detections_in_pixels() -> None:
    want = outputs((*BOX, 0.9, 0.0), (*FAR, 0.0, 0.9))
    got = outputs((0, 0.25, 10, 10, 0.9, 0.0), (0, 30, 9, 40, 0.9, 0.0))
    assert corner_differences(got, want).tolist() == [0.25]
    assert corner_differences(got, outputs((*BOX, 0.0, 0.0))).tolist() == []
    assert corner_differences(want, want).tolist() == [0, 0]


def test_images_without_detections_agree() -> None:
    nothing = outputs((0, 0, 1, 1, 0.1, 0.1))
    assert same_detections(nothing, nothing).tolist() == [True]


def test_outputs_are_those_of_every_example_in_order() -> None:
    data = examples(5)

    def model(images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))[:, None, None].expand(-1, 7, 14)

    pairs = list(predict(model, data, 2))
    assert [len(o) for o, _ in pairs] == [2, 2, 1]
    want = data.gather(range(5))[0].mean((1, 2, 3))
    torch.testing.assert_close(torch.cat([o for o, _ in pairs])[:, 0, 0], want)
    assert score((o.clamp(0, 0) for o, _ in pairs), data)["map"] == 0
    with pytest.raises(DataError, match=r"outputs \[batch, points, 14\]"):
        next(predict(lambda x: x, data, 2))
