from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from fewbits.allocate import uniform_plan
from fewbits.deploy import align_biases, pack, verify
from fewbits.deploy.onnx_export import export_onnx
from fewbits.errors import DataError, RecipeError
from fewbits.layers import balance_fusion, calibrate, quantize
from fewbits.layers.concat import Concat
from fewbits.tasks.detection import DetectionExamples, scene_examples
from fewbits.tasks.detection_metrics import predict, same_detections, score
from fewbits.tasks.detector import SIZES, Detector, Size, grid, own_detector
from fewbits.tasks.scenes import make_scenes
from fewbits.tasks.tood import Predictions, assign, inside, iou, tood_loss

TINY = Size((8, 8, 16, 16, 24), 16, 1, 1)


def tiny(classes: int = 10) -> Detector:
    return Detector(TINY, classes)


def test_sizes_and_outputs() -> None:
    counts = [sum(p.numel() for p in own_detector(name, 3).parameters()) for name in SIZES]
    assert counts == sorted(counts) and 3e5 < counts[0] < 5e5
    found = tiny(3).eval()(torch.zeros(2, 3, 64, 96))
    assert found.shape == (2, 8 * 12 + 4 * 6 + 2 * 3, 4 + 3)
    assert found[..., 4:].max() < 0.05, "at the start nothing is seen"
    with pytest.raises(DataError, match="multiples of 32"):
        tiny()(torch.zeros(1, 3, 40, 64))
    with pytest.raises(RecipeError, match="detector_nano"):
        own_detector("detector_tiny", 3)


def test_fusions_of_the_neck_are_modules_with_named_branches() -> None:
    found = {name: m.branches for name, m in tiny().named_modules() if isinstance(m, Concat)}
    assert list(found) == ["neck.fuse4", "neck.fuse3", "neck.fuse4_up", "neck.fuse5_up"]
    assert set(found.values()) == {("deep", "shallow")}
    nodes = balance_fusion(tiny(), torch.randn(1, 3, 64, 64))
    assert {name.rpartition(".")[0]: node.branches for name, node in nodes.items()} == found


def test_points_are_the_middles_of_cells() -> None:
    points, strides = grid([(2, 3), (1, 2), (1, 1)], torch.device("cpu"))
    assert points[:6].tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]
    assert points[6:].tolist() == [[8, 8], [24, 8], [16, 16]] and strides.tolist() == [8] * 6 + [16] * 2 + [32]


def scene(boxes: torch.Tensor, logits: torch.Tensor) -> Predictions:
    points, strides = grid([(4, 4), (2, 2), (1, 1)], torch.device("cpu"))
    return Predictions(logits[None], boxes[None], points, strides)


def test_points_inside_are_assigned_by_score_and_overlap() -> None:
    """Eq. 4 by hand: of four points inside, the weights are t / max(t) * max(IoU)."""
    corners = torch.tensor([[[0.0, 0.0, 16.0, 16.0], [0.0] * 4]])
    labels = torch.tensor([[1, -1]])
    boxes, logits = torch.zeros(21, 4), torch.full((21, 2), -9.0)
    boxes[[0, 1, 4, 5]] = torch.tensor([[0, 0, 16, 14], [0, 0, 16, 12], [0, 0, 16, 8], [0, 0, 16, 14.0]])
    logits[[0, 1, 4, 5], 1] = torch.tensor([0.0, 2.0, 0.0, -1.0])
    found = scene(boxes, logits)
    points = inside(found, corners)[0, 0].nonzero()[:, 0].tolist()
    assert points == [0, 1, 4, 5, 16, 20], "the middle of the coarsest cell is on the corner"
    got = assign(found.logits.sigmoid(), found.boxes, found, labels, corners)
    s, u = torch.tensor([0.0, 2.0, 0.0, -1.0]).sigmoid(), torch.tensor([0.875, 0.75, 0.5, 0.875])
    t = s * u**6
    torch.testing.assert_close(got.share[0, [0, 1, 4, 5]], t / t.max(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.weight, 0.875 * got.share)
    assert got.share[0].sum() == pytest.approx(float((t / t.max()).sum()), abs=1e-6)


def test_a_point_finds_one_object_and_the_smallest_object_has_a_point() -> None:
    corners = torch.tensor([[[0.0, 0.0, 32.0, 32.0], [0.0, 0.0, 32.0, 30.0], [13.0, 13.0, 14.0, 14.0]]])
    labels = torch.tensor([[0, 1, 0]])
    boxes = torch.tensor([0.0, 0.0, 32.0, 31.0]).repeat(21, 1)
    boxes[5] = torch.tensor([13.0, 13.0, 14.0, 14.0])
    got = assign(torch.full((1, 21, 2), 0.5), boxes[None], scene(boxes, torch.zeros(21, 2)), labels, corners)
    taken = got.object[0][got.weight[0] > 0]
    assert got.weight.max() <= 1 + 1e-6, "the weight is that of one object, and not of two together"
    assert int(got.object[0, 5]) == 2 and got.weight[0, 5] == pytest.approx(1, abs=1e-3)
    best = iou(corners, boxes[None])[0, :2, 0]
    assert set(taken.tolist()) == {int(best.argmax()), 2}, "all other points are nearer to one of the two"


@pytest.mark.parametrize("rows", [0, 1])
def test_a_batch_without_objects_teaches_that_there_is_nothing(rows: int) -> None:
    model = tiny(2).train()
    loss = model(torch.randn(2, 3, 64, 64), torch.full((2, rows, 5), -1.0))
    loss.backward()
    assert 0 < float(loss.detach()) < 1
    assert model.heads[0].class_out.bias.grad.min() > 0  # type: ignore[union-attr]
    assert not model.heads[0].box_out.weight.grad.any()  # type: ignore[union-attr]


def test_the_loss_is_least_where_boxes_and_scores_are_right() -> None:
    targets = torch.tensor([[[1.0, 4.0, 4.0, 20.0, 24.0]]])
    right, off = targets[0, 0, 1:].repeat(21, 1), torch.tensor([0.0, 0.0, 9.0, 9.0]).repeat(21, 1)
    held = scene(right, torch.zeros(21, 2))
    sure = torch.full((21, 2), -9.0)
    sure[inside(held, targets[..., 1:])[0, 0], 1] = 9.0
    losses = [float(tood_loss(scene(b, logits), targets)) for b, logits in ((right, sure), (off, sure), (right, -sure))]
    assert losses[0] < 1e-3 and min(losses[1:]) > 0.5


@pytest.fixture(scope="module")
def learned() -> tuple[Detector, DetectionExamples, list[float]]:
    """Train on eight scenes until they are known."""
    torch.manual_seed(0)
    data = scene_examples(make_scenes("train", 8, size=64))
    model, batch, losses = Detector(TINY, 10).train(), data.gather(range(8)), []
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for _ in range(60):
        loss = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, data, losses


Learned = tuple[Detector, DetectionExamples, list[float]]


def test_it_learns_to_find_digits(learned: Learned) -> None:
    model, data, losses = learned
    assert losses[-1] < 0.5 * losses[0]
    assert score((o for o, _ in predict(model, data, 8)), data)["map50"] > 40, "it knows what it was shown"


def test_a_packed_one_detects_the_same_in_onnx_runtime(learned: Learned, tmp_path: Path) -> None:
    model, images = copy.deepcopy(learned[0]), learned[1].gather(range(8))[0]
    calibrate(quantize(model, uniform_plan(model, 4, 8, first_last=8), verbose=False), [images])
    align_biases(model, images[:2])
    packed = pack(model, images[:2])
    export_onnx(packed, tmp_path / "m.onnx", images[:2])
    report = verify(tmp_path / "m.onnx", packed, [images], agreement=same_detections, min_agreement=90)
    assert report.samples > 8 and report.max_abs_diff < 1
