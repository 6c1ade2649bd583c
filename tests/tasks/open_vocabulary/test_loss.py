"""Assignment by hand and the task loss against slow formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import box_iou

from fewbits.errors import DataError
from fewbits.tasks.open_vocabulary.assign import RULES, alignment, assigned, positives
from fewbits.tasks.open_vocabulary.loss import detection_loss, distances, side_loss
from fewbits.tasks.tood import Assignment
from tests.tasks.open_vocabulary.answers import TARGETS, answer, with_sides


def slow_assignment(seed: int) -> dict[tuple[int, int], tuple[int, float]]:
    """Return (image, point) -> (object, soft target), by loops over the rule of the specification."""
    found, chosen = answer(seed), {}
    for b, rows in enumerate(TARGETS):
        candidates: dict[int, list[tuple[float, int, float]]] = {}
        for m, (label, *corners) in enumerate(rows.tolist()):
            if label < 0:
                continue
            x, y = (corners[0] + corners[2]) / 2, (corners[1] + corners[3]) / 2
            fits = []
            for n, (px, py) in enumerate(found.points.tolist()):
                if abs(px - x) > max((corners[2] - corners[0]) / 2, 4) or abs(py - y) > max((corners[3] - y), 4):
                    continue
                u = float(box_iou(found.boxes[b, n][None], torch.tensor([corners])))
                fits.append((float(found.logits[b, n, int(label)].sigmoid()) ** 0.5 * u**6, u, n))
            for fit, u, n in sorted(fits, reverse=True)[:10]:
                candidates.setdefault(n, []).append((u, m, fit))
        best = {n: max(c) for n, c in candidates.items()}
        for n, (_, m, fit) in best.items():
            mine = [(f, u) for u, k, f in best.values() if k == m]
            chosen[b, n] = (m, fit / max(f for f, _ in mine) * max(u for _, u in mine))
    return chosen


def test_points_are_assigned_as_loops_do_it() -> None:
    got, label, corners = assigned(answer(0), TARGETS)
    expected = slow_assignment(0)
    there = {(b, n) for b, n in (got.share > 1e-6).nonzero().tolist()}
    assert there <= set(expected) and len(there) > 20
    for (b, n), (m, weight) in expected.items():
        assert float(got.weight[b, n]) == pytest.approx(weight, abs=1e-4)
        if (b, n) in there:
            assert int(got.object[b, n]) == m and int(label[b, n]) == int(TARGETS[b, m, 0])
            assert corners[b, n].tolist() == TARGETS[b, m, 1:].tolist()
    assert (label[got.share == 0] == -1).all() and (label[1] == -1).all()
    assert torch.equal(positives(answer(0), TARGETS), label)


def test_every_object_has_at_most_ten_points_and_the_tiny_one_has_some() -> None:
    got, _, _ = assigned(answer(1), TARGETS)
    counts = [int(((got.object[b] == m) & (got.share[b] > 0)).sum()) for b, m in ((0, 0), (0, 1), (0, 2), (2, 0))]
    assert max(counts) == RULES.candidates and counts[3] >= 1


def test_fits_of_queries_are_score_and_overlap_powers() -> None:
    found = answer(0)
    fit = alignment(found.logits.sigmoid(), found.boxes, TARGETS)
    u = float(box_iou(TARGETS[0, 1, 1:][None], found.boxes[0, 30][None]))
    assert float(fit[0, 1, 30]) == pytest.approx(float(found.logits[0, 30, 3].sigmoid()) ** 0.5 * u**6, rel=1e-4)
    assert not fit[1].any() and alignment(found.logits, found.boxes, TARGETS[:, :0]).shape == (3, 1, 84)


def test_the_parts_of_the_loss_by_their_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """One positive point of weight 0.8 and one of weight 0.7, in an image each."""
    found = answer(2)
    weight, which = torch.zeros(3, 84), torch.zeros(3, 84, dtype=torch.int64)
    weight[0, 27], which[0, 27], weight[2, 9], which[2, 9] = 0.8, 1, 0.7, 1
    chosen = Assignment(which, weight, (weight > 0).float())
    monkeypatch.setattr("fewbits.tasks.open_vocabulary.assign.assign", lambda *_: chosen)
    got = detection_loss(found, TARGETS)
    wanted = torch.zeros_like(found.logits)
    wanted[0, 27, 3], wanted[2, 9, 0] = 0.8, 0.7
    p = found.logits.sigmoid()
    entropy = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).sum()
    assert float(got.classes) == pytest.approx(0.5 * float(entropy) / 1.5, rel=1e-5)
    boxes = sides = 0.0
    for b, n, w in ((0, 27, 0.8), (2, 9, 0.7)):
        truth, box = TARGETS[b, 1, 1:], found.boxes[b, n]
        boxes += w * ciou_loss(box.tolist(), truth.tolist())
        far = torch.cat([found.points[n] - truth[:2], truth[2:] - found.points[n]]) / found.strides[n]
        for side, d in enumerate(far.tolist()):
            d = max(d, 0.0)  # the point may be chosen although it is outside
            low, log = int(d), found.sides[b, n, side].log_softmax(0)
            sides -= w * float((low + 1 - d) * log[low] + (d - low) * log[low + 1]) / 4
    assert float(got.boxes) == pytest.approx(7.5 * boxes / 1.5, rel=1e-4)
    assert float(got.sides) == pytest.approx(1.5 * sides / 1.5, rel=1e-4)
    assert torch.equal(got.total, got.classes + got.boxes + got.sides)


def ciou_loss(a: list[float], b: list[float]) -> float:
    """Return 1 - IoU + centre distance^2 / diagonal^2 + alpha v, eq. 7-11 of the paper."""
    u = float(box_iou(torch.tensor([a]), torch.tensor([b])))
    centre = sum((a[i] + a[i + 2] - b[i] - b[i + 2]) ** 2 / 4 for i in (0, 1))
    diagonal = sum((max(a[i + 2], b[i + 2]) - min(a[i], b[i])) ** 2 for i in (0, 1))
    angles = [math.atan((c[2] - c[0]) / (c[3] - c[1])) for c in (a, b)]
    v = 4 / math.pi**2 * (angles[0] - angles[1]) ** 2
    return 1 - u + centre / diagonal + v * v / (1 - u + v)


def test_the_loss_falls_to_the_entropy_of_the_soft_targets_where_the_answer_is_right() -> None:
    found = answer(3)
    targets = torch.tensor([[[2.0, 0.0, 0.0, 64.0, 64.0]]]).expand(3, -1, -1)
    far = distances(targets[0, 0, 1:].expand(84, 4), found.points, found.strides)
    bins = torch.arange(16.0)
    near = 1 - (far[..., None] - bins).abs()
    sides = torch.where(near > 0, (near + 1e-9).log() + 30, 0.0)
    right = with_sides(found, sides.expand(3, -1, -1, -1))
    logits = torch.full_like(found.logits, -12.0)
    logits[..., 2] = 12.0
    got = detection_loss(right._replace(logits=logits), targets)
    assert float(got.boxes) < 1e-3 and float(got.total) < 0.6 * float(detection_loss(found, targets).total)


def test_without_objects_classes_alone_are_taught() -> None:
    found = answer(4)
    for targets in (TARGETS[:, :0], torch.full((3, 2, 5), -1.0)):
        sides, logits = found.sides.clone().requires_grad_(), found.logits.clone().requires_grad_()
        loss = detection_loss(with_sides(found, sides)._replace(logits=logits), targets)
        loss.total.backward()
        assert loss.boxes.item() == loss.sides.item() == 0.0 and not sides.grad.any()
        assert (logits.grad > 0).all()


def test_sides_are_pulled_to_the_two_bins_next_to_the_distance() -> None:
    sides = torch.zeros(1, 4, 16, requires_grad=True)
    side_loss(sides, torch.tensor([[0.0, 2.25, 14.99, 7.0]])).sum().backward()
    pulled = [row.lt(0).nonzero().flatten().tolist() for row in sides.grad[0]]
    assert pulled == [[0], [2, 3], [14, 15], [7]] or pulled == [[0], [2, 3], [15], [7]]
    assert float(sides.grad[0, 1, 2]) == pytest.approx((1 / 16 - 0.75) / 4)
    clamped = distances(torch.tensor([[8.0, 0.0, 999.0, 4.0]]), torch.tensor([[4.0, 4.0]]), torch.tensor([8.0]))
    assert clamped[0].tolist() == pytest.approx([0.0, 0.5, 14.99, 0.0])


def test_labels_without_a_text_are_told() -> None:
    with pytest.raises(DataError, match="label 4 has no text: 4 were given"):
        detection_loss(answer(0, texts=4), TARGETS)
    with pytest.raises(DataError, match=r"targets must be \[B, M, 5\].*\[3, 5\]"):
        detection_loss(answer(0), TARGETS[0])
