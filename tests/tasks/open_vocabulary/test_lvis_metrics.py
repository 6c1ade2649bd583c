from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits.errors import DataError
from fewbits.tasks.detection import DetectionExamples, Objects, scene_examples
from fewbits.tasks.detection_metrics import Detections, coco_map, on_originals
from fewbits.tasks.open_vocabulary.federated import read_lvis
from fewbits.tasks.open_vocabulary.lvis_metrics import fixed_ap, group_means, score_fixed
from fewbits.tasks.open_vocabulary.truth import Truth, Verified
from fewbits.tasks.scenes import make_scenes

BOX = [10.0, 10.0, 30.0, 30.0]
EVERYWHERE = [-9999.0, -9999.0, 9999.0, 9999.0]
FAR = [60.0, 60.0, 90.0, 90.0]


def objects(*labelled: tuple[int, list[float]], crowd: Sequence[bool] | None = None) -> Objects:
    boxes = torch.tensor([box for _, box in labelled]).reshape(-1, 4)
    found = Objects.of(boxes, torch.tensor([label for label, _ in labelled], dtype=torch.int64))
    return found if crowd is None else dataclasses.replace(found, crowd=torch.tensor(crowd))


def seen(*scored: tuple[int, float, list[float]]) -> Detections:
    labels = torch.tensor([label for label, _, _ in scored], dtype=torch.int64)
    boxes = torch.tensor([box for _, _, box in scored]).reshape(-1, 4)
    return Detections(boxes, torch.tensor([score for _, score, _ in scored]), labels)


def truth(*given: Objects, verified: Sequence[Verified] | None = None, classes: str = "ab") -> Truth:
    names = tuple(str(i) for i in range(len(given)))
    return Truth(given, names, tuple(classes), None if verified is None else dict(zip(names, verified)))


def noisy(given: Truth, copies: int = 3) -> list[Detections]:
    """Return the objects, moved a little, some of another class, and as many boxes anywhere; scores have ties."""
    found = []
    for one in given.objects:
        sides = (one.boxes[:, 2:] - one.boxes[:, :2]).repeat(1, 2)
        near = [one.boxes + 0.05 * k * sides * torch.randn(one.boxes.shape) for k in range(copies)]
        boxes = torch.cat([*near, one.boxes.roll(1, 0) + 15])
        labels = one.labels.repeat(copies + 1)
        other = torch.randint(0, len(given.classes), labels.shape)
        labels = torch.where(torch.rand(len(labels)) < 0.2, other, labels)
        found.append(Detections(boxes, (50 * torch.rand(len(labels))).round() / 50, labels))
    return found


def pycoco(found: Sequence[Detections], given: Truth) -> tuple[list[float], dict[str, float | None]]:
    """Return (map, map50, map75) and map by class of pycocotools, told LVIS' rules by its own means.

    What does not count is left out; where not all objects are marked, a crowd covers the image, which swallows
    detections that match nothing else.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    counts, partial = given.looked_for()
    marked, results = list[dict[str, Any]](), list[dict[str, Any]]()
    for image, (one, detected) in enumerate(zip(given.objects, found)):
        crowds = [
            (label, [-9999.0, -9999.0, 9999.0, 9999.0], True) for label in partial[image].nonzero()[:, 0].tolist()
        ]
        for label, box, crowd in [*zip(one.labels.tolist(), one.boxes.tolist(), one.crowd.tolist()), *crowds]:
            marked.append(_entry(image, label, box) | {"iscrowd": int(crowd), "area": 1.0})
        for label, box, score in zip(detected.labels.tolist(), detected.boxes.tolist(), detected.scores.tolist()):
            if counts[image, label]:
                results.append(_entry(image, label, box) | {"score": score, "area": 1.0, "iscrowd": 0})
    truth, detections = COCO(), COCO()
    for coco, entries in ((truth, marked), (detections, results)):
        coco.dataset = {
            "images": [{"id": i} for i in range(len(found))],
            "categories": [{"id": i, "name": name} for i, name in enumerate(given.classes)],
            "annotations": [{"id": i, **a} for i, a in enumerate(entries, 1)],
        }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        detections.createIndex()
        evaluation = COCOeval(truth, detections, "bbox")
        evaluation.params.maxDets, evaluation.params.areaRng = [10**6], [[0, 1e10]]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = torch.from_numpy(evaluation.eval["precision"])[:, :, :, 0, 0]  # IoU, recall, class
    known = [p.mean() * 100 if (p := precision[:, :, i])[0, 0] >= 0 else None for i in range(len(given.classes))]
    at = [precision, precision[:1], precision[5:6]]
    return [100 * float(p[p >= 0].mean()) for p in at], dict(zip(given.classes, known))


def _entry(image: int, label: int, box: Sequence[float]) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    return {"image_id": image, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1]}


def same(found: Sequence[Detections], given: Truth) -> float:
    """Check ours against pycocotools; return the map."""
    ours, (means, per_class) = fixed_ap(found, given), pycoco(found, given)
    assert [ours["map"], ours["map50"], ours["map75"]] == pytest.approx(means, abs=1e-6)
    for name, value in per_class.items():
        assert ours["per_class"][name] == (None if value is None else pytest.approx(float(value), abs=1e-6))
    return float(ours["map"])


@pytest.fixture(scope="module")
def scenes() -> DetectionExamples:
    return scene_examples(make_scenes("test", 40, size=64))


def test_it_equals_pycocotools_where_all_is_marked_and_with_crowds(scenes: DetectionExamples) -> None:
    given = Truth.of(scenes)
    crowds = tuple(dataclasses.replace(o, crowd=torch.rand(len(o.labels)) < 0.2) for o in given.objects)
    for marked in (given, dataclasses.replace(given, objects=crowds)):
        assert 20 < same(noisy(marked), marked) < 95


def test_it_equals_pycocotools_under_the_federated_rule(scenes: DetectionExamples) -> None:
    verified = {}
    for name, marked in zip(scenes.names, scenes.objects):
        shown = {scenes.classes[label] for label in marked.labels.tolist()}
        absent = {c for c in scenes.classes if torch.rand(()) < 0.3} - shown
        verified[name] = Verified(frozenset(absent), frozenset(c for c in shown if torch.rand(()) < 0.4))
    given = Truth.of(scenes, verified)
    found = noisy(given)
    federated = same(found, given)
    assert federated > fixed_ap(found, Truth.of(scenes))["map"] + 1  # fewer wrong ones count


def test_it_is_that_of_coco_where_an_image_has_few_detections(scenes: DetectionExamples) -> None:
    found = noisy(Truth.of(scenes))
    ours, coco = fixed_ap(on_originals(found, scenes), Truth.of(scenes)), coco_map(found, scenes)
    for name in ("map", "map50", "map75"):
        assert ours[name] == pytest.approx(coco[name], abs=1e-6)


def test_it_equals_pycocotools_on_real_annotations_of_lvis(shared: Path) -> None:
    file = shared / "lvis_val_100/lvis_val_100.json"
    if not file.is_file():
        pytest.skip("no annotations of LVIS beside the checkout")
    read = read_lvis(file, shared)
    given = Truth.of_records(read.records, read.classes, read.verified)
    assert 20 < same(noisy(given), given) < 95


def test_what_was_not_looked_for_does_not_count() -> None:
    marked = objects((0, BOX)), objects()
    found = [seen((0, 0.5, BOX)), seen((0, 0.9, BOX))]
    unknown, absent = Verified(), Verified(absent=frozenset("a"))
    assert fixed_ap(found, truth(*marked, verified=[unknown, unknown]))["map"] == 100
    assert fixed_ap(found, truth(*marked, verified=[unknown, absent]))["map"] == pytest.approx(50)
    assert fixed_ap(found, truth(*marked))["map"] == pytest.approx(50)


def test_wrong_detections_do_not_count_where_not_all_is_marked() -> None:
    found = [seen((0, 0.9, FAR), (0, 0.5, BOX))]
    assert fixed_ap(found, truth(objects((0, BOX)), verified=[Verified()]))["map"] == pytest.approx(50)
    partial = Verified(partial=frozenset("a"))
    assert fixed_ap(found, truth(objects((0, BOX)), verified=[partial]))["map"] == 100


def test_the_limit_is_of_a_class_over_all_images_and_none_of_an_image() -> None:
    other = [(1, 0.9, FAR)] * 400  # would push class a out of the best 100 or 300 of the image
    found = [seen(*other, (0, 0.1, BOX)), seen((0, 0.2, FAR))]
    given = truth(objects((0, BOX)), objects())
    assert fixed_ap(found, given)["per_class"]["a"] == pytest.approx(50)
    assert fixed_ap(found, given, limit=2)["per_class"]["a"] == pytest.approx(50)
    assert fixed_ap(found, given, limit=1)["per_class"]["a"] == 0


def test_what_goes_early_changes_nothing(scenes: DetectionExamples, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Truth.of(scenes)
    found = noisy(given)
    at_once = fixed_ap(found, given, limit=25)
    assert at_once["map"] < fixed_ap(found, given)["map"]
    monkeypatch.setattr("fewbits.tasks.open_vocabulary.lvis_metrics.CHUNK", 30)
    assert fixed_ap(iter(found), given, limit=25) == at_once


def test_the_limit_is_taken_before_the_federated_rule() -> None:
    given = truth(objects((0, BOX)), objects(), verified=[Verified(), Verified()])
    found = [seen((0, 0.1, BOX)), seen((0, 0.2, FAR))]
    assert fixed_ap(found, given, limit=2)["map"] == 100 and fixed_ap(found, given, limit=1)["map"] == 0


def test_groups_are_means_over_their_classes_that_have_objects() -> None:
    given = truth(objects((0, BOX), (1, FAR)), classes="abc")
    found = [seen((0, 0.9, BOX), (2, 0.9, BOX))]
    groups = {"base": ("a", "c"), "novel": ("b",), "rare": ("c",), "all": ("a", "b", "c")}
    got = fixed_ap(found, given, groups)
    assert got["per_class"] == {"a": pytest.approx(100), "b": 0, "c": None} and got["map"] == pytest.approx(50)
    assert got["groups"] == {"base": pytest.approx(100), "novel": 0, "rare": None, "all": pytest.approx(50)}
    with pytest.raises(DataError, match="'person' of the group 'base' is unknown; did you mean 'persons'"):
        group_means({"persons": 1.0}, {"base": ("person",)})


def test_outputs_of_a_detector_are_scored_on_the_images_before_scaling(scenes: DetectionExamples) -> None:
    wide = dataclasses.replace(
        scenes,
        sizes=scenes.sizes * 2,
        objects=tuple(dataclasses.replace(o, boxes=2 * o.boxes) for o in scenes.objects),
    )
    points = max(len(o.labels) for o in scenes.objects)

    def output(marked: Objects) -> Tensor:
        rows = torch.zeros(1, points, 4 + len(scenes.classes))
        for row, (box, label) in enumerate(zip(marked.boxes, marked.labels.tolist())):
            rows[0, row, :4], rows[0, row, 4 + label] = box, 0.002  # below the least score of COCO's metric
        return rows

    outputs = [output(marked) for marked in scenes.objects]
    got = score_fixed(outputs, wide, {"half": scenes.classes[:5]})
    assert got["map"] == pytest.approx(100) and got["groups"] == {"half": pytest.approx(100)}
    with pytest.raises(DataError, match="more than 40 images for 40"):
        score_fixed([*outputs, outputs[0]], wide)
    with pytest.raises(DataError, match="39 images for 40"):
        score_fixed(outputs[:-1], wide)


def test_nothing_found_scores_none_and_nothing_marked_has_no_score() -> None:
    assert fixed_ap([seen()], truth(objects((0, BOX))))["map"] == 0
    nothing = fixed_ap([seen((0, 0.9, BOX))], truth(objects()))
    assert nothing["map"] is None and nothing["per_class"] == {"a": None, "b": None}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "0 images for the objects of 1"),
        ([seen((2, 0.5, BOX))], r"label 2, outside of 0\.\.1"),
        ([seen((0, float("nan"), BOX))], "not finite"),
    ],
)
def test_wrong_detections_are_told(found: list[Detections], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fixed_ap(found, truth(objects((0, BOX))))
