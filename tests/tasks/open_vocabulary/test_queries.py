"""Distillation and task loss of detectors with queries, on made-up answers."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou

from fewbits.errors import DataError, TrainingError
from fewbits.losses import Joint, tpsd
from fewbits.tasks.open_vocabulary.detr_loss import cost, detr_loss, layer_loss, match
from fewbits.tasks.open_vocabulary.queries import Proposals, Queries, centred, corners, fits, query_distillation
from tests.tasks.open_vocabulary.answers import TARGETS

SIZE = (64, 64)


def said(seed: int, queries: int = 20, texts: int = 5) -> Queries:
    generator = torch.Generator().manual_seed(seed)
    v, t = torch.randn(3, queries, 8, generator=generator), torch.randn(3, texts, 8, generator=generator)
    middle, sides = torch.rand(2, 3, queries, 2, generator=generator)
    boxes = corners(torch.cat([0.2 + 0.6 * middle, 0.2 + 0.7 * sides], -1), SIZE)
    logits = F.normalize(v, dim=-1) @ F.normalize(t, dim=-1).mT * 3
    first = torch.randn(3, queries, texts, generator=generator), boxes + 1
    made = Proposals(v, torch.randn(3, queries, 4, generator=generator))
    return Queries(v, t, logits, boxes, SIZE, (first, (logits, boxes)), (), made)


def test_boxes_go_back_and_forth() -> None:
    boxes = torch.tensor([[0.5, 0.25, 0.5, 0.1]])
    assert corners(boxes, (100, 200))[0].tolist() == pytest.approx([25, 40, 75, 60])
    assert torch.allclose(centred(corners(boxes, (100, 200)), (100, 200)), boxes)


def test_ranks_are_compared_one_by_one() -> None:
    student, teacher = said(0), said(1)
    got = query_distillation(student, teacher, TARGETS, count=3)
    mine, theirs = fits(student, TARGETS), fits(teacher, TARGETS)
    image = torch.zeros(3, 9, dtype=torch.int64)
    picked, labels = [image.clone(), image.clone()], image - 1
    for b in range(3):
        ranked = []
        for fit in (mine[b], theirs[b]):
            top = fit.topk(3).indices.tolist()
            owner = {
                q: max((float(fit[m, q]), m) for m in range(3) if q in top[m])[1]
                for q in range(20)
                if any(q in t for t in top)
            }
            ranked.append([[q for q in top[m] if owner[q] == m and fit[m, q] > 0] for m in range(3)])
        pairs = [(m, s, t) for m in range(3) for s, t in zip(ranked[0][m], ranked[1][m])]
        for place, (m, s, t) in enumerate(pairs):
            picked[0][b, place], picked[1][b, place], labels[b, place] = s, t, int(TARGETS[b, m, 0])
    rows = [m.embeddings.gather(1, i[..., None].expand(-1, -1, 8)) for m, i in zip((student, teacher), picked)]
    expected = tpsd(Joint(rows[0], student.texts), Joint(rows[1], teacher.texts), labels)
    assert float(got) > 0.01 and float(got) == pytest.approx(float(expected), abs=1e-6)


def test_a_student_in_another_order_is_known_by_rank_and_not_by_index() -> None:
    teacher, order = said(1), torch.randperm(20)
    changed = {f: getattr(teacher, f)[:, order] for f in ("embeddings", "logits", "boxes")}
    student = dataclasses.replace(teacher, **changed)
    assert float(query_distillation(student, teacher, TARGETS)) < 1e-9
    assert float(query_distillation(student, teacher, TARGETS, pairing="shared")) > 0.01
    assert float(query_distillation(teacher, teacher, TARGETS, pairing="shared")) == 0


def test_shared_needs_the_proposals_of_the_teacher() -> None:
    with pytest.raises(TrainingError, match="needs a student that answers with the teacher's proposals"):
        query_distillation(said(0), said(1), TARGETS, pairing="shared")
    patches = [dataclasses.replace(said(seed), proposals=None) for seed in (0, 1)]
    assert float(query_distillation(*patches, TARGETS, pairing="shared")) > 0.01
    with pytest.raises(TrainingError, match=r"pairing must be one of .*got 'index'"):
        query_distillation(said(0), said(1), TARGETS, pairing="index")


def test_without_objects_nothing_is_distilled_and_classes_alone_are_taught() -> None:
    assert float(query_distillation(said(0), said(1), TARGETS[:, :0])) == 0.0
    logits, boxes = said(0).logits.requires_grad_(), said(0).boxes.requires_grad_()
    layer_loss(logits, boxes, TARGETS[1:2].expand(3, -1, -1), SIZE).backward()
    assert (logits.grad > 0).all() and not boxes.grad.any()  # type: ignore[union-attr, operator]


def test_matching_is_the_best_of_all() -> None:
    found, rows = said(2, queries=5), TARGETS[0]
    costs = cost(found.logits[0], found.boxes[0], rows, SIZE)
    score = float(found.logits[0, 3, 1].sigmoid())
    focal = 0.25 * (1 - score) ** 2 * -torch.tensor(score).log() - 0.75 * score**2 * -torch.tensor(1 - score).log()
    box, truth = found.boxes[0, 3], rows[2, 1:]
    far = (centred(box, SIZE) - centred(truth, SIZE)).abs().sum()
    expected = 2 * focal + 5 * far - 2 * generalized_box_iou(box[None], truth[None])[0, 0]
    assert float(costs[3, 2]) == pytest.approx(float(expected), abs=1e-4)
    best = min(itertools.permutations(range(5), 3), key=lambda p: sum(float(costs[q, m]) for m, q in enumerate(p)))
    image, query, thing = match(found.logits[:1], found.boxes[:1], TARGETS[:1], SIZE)
    assert {(int(m), int(q)) for q, m in zip(query, thing)} == set(enumerate(best)) and not image.any()
    assert len(match(found.logits[:1, :2], found.boxes[:1, :2], TARGETS[:1], SIZE)[0]) == 2, (
        "fewer queries than objects"
    )


def test_the_loss_of_a_layer_by_its_formula() -> None:
    found = said(3)
    image, query, thing = match(found.logits, found.boxes, TARGETS, SIZE)
    wanted = torch.zeros_like(found.logits)
    far = apart = torch.tensor(0.0)
    weight = 0.75 * found.logits.sigmoid() ** 2
    for b, q, m in zip(image, query, thing):
        box, truth, label = found.boxes[b, q], TARGETS[b, m, 1:], int(TARGETS[b, m, 0])
        weight[b, q, label] = wanted[b, q, label] = box_iou(box[None], truth[None])[0, 0]
        far = far + (centred(box, SIZE) - centred(truth, SIZE)).abs().sum()
        apart = apart + 1 - generalized_box_iou(box[None], truth[None])[0, 0]
    p = found.logits.sigmoid()
    classes = -(weight * (wanted * p.log() + (1 - wanted) * (1 - p).log())).sum()
    expected = (classes + 5 * far + 2 * apart) / 5
    got = layer_loss(found.logits, found.boxes, TARGETS, SIZE)
    assert float(got) == pytest.approx(float(expected), rel=1e-4)
    both: Tensor = got + layer_loss(*found.layers[0], TARGETS, SIZE)
    assert torch.allclose(detr_loss(found, TARGETS), both)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(TrainingError, match="not finite: lower the learning rate"):
        layer_loss(said(0).logits * float("nan"), said(0).boxes, TARGETS, SIZE)
    with pytest.raises(DataError, match="label 4 has no text"):
        detr_loss(said(0, texts=4), TARGETS)
