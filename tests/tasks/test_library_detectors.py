from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.allocate import uniform_plan
from fewbits.deploy import pack, verify
from fewbits.deploy.onnx_export import export_onnx
from fewbits.errors import DataError, RecipeError
from fewbits.layers import calibrate, quantize, quantized_layers
from fewbits.tasks.detection_metrics import same_detections
from fewbits.tasks.library_detectors import OneStage, library_detector

SSD = "torchvision:ssdlite320_mobilenet_v3_large"
NAMES = [
    SSD,
    "torchvision:fcos_resnet50_fpn",
    "torchvision:retinanet_resnet50_fpn",
    "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn",
]
TARGETS = torch.tensor([[[1.0, 4, 4, 40, 50], [0.0, 30, 20, 60, 60]], [[-1.0] * 5] * 2])


def theirs(model: Any, images: Tensor) -> list[dict[str, Tensor]]:
    """Run torchvision's own way from images to detections, on the images as they are."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    side = images.shape[-1]
    model.transform = GeneralizedRCNNTransform(side, side, [0.0] * 3, [1.0] * 3)
    found: list[dict[str, Tensor]] = model(list(images))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_losses_are_torchvisions_own(name: str) -> None:
    detector = library_detector(name, 3)
    images = torch.rand(2, 3, 64, 64)
    detector.train()
    loss = detector(images, TARGETS)
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    assert detector.model.backbone.training and any(p.grad is not None and p.grad.any() for p in detector.parameters())
    detector.eval()
    for owner in (detector.model, getattr(detector.model, "roi_heads", detector.model)):
        owner.score_thresh = 0.0
    with torch.no_grad():
        got, want = detector(images), theirs(detector.model, images)
    assert got.shape[0] == 2 and got.shape[2] == 7
    for rows, one in zip(got, want):
        assert len(one["labels"]) > 5
        for box, score, label in list(zip(one["boxes"], one["scores"], one["labels"]))[:20]:
            near = (rows[:, :4].clamp(0, 64) - box).abs().amax(1) + (
                rows[:, 4 + int(label) - int(detector.background)] - score
            ).abs()
            assert near.min() < 1e-3


def test_backbone_and_heads_are_quantized_and_packed() -> None:
    detector, images = library_detector(SSD, 3).eval(), torch.rand(2, 3, 64, 64)
    calibrate(quantize(detector, uniform_plan(detector, 8, 8), verbose=False), [images])
    names = list(quantized_layers(detector))
    assert any(".backbone." in n for n in names) and any(".head." in n for n in names)
    assert torch.equal(pack(detector)(images), detector(images))


def test_a_packed_one_stage_detector_runs_in_onnx_runtime(tmp_path: Path) -> None:
    """A tiny one with the parts of SSD; others take the exporter long."""
    from torchvision.models.detection import ssd
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator

    class Backbone(nn.Sequential):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"0": super().forward(x)}

    backbone = Backbone(
        nn.Conv2d(3, 8, 3, 4, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 4, padding=1)
    )
    backbone.out_channels = [8]  # type: ignore[assignment]
    detector = OneStage(ssd.SSD(backbone, DefaultBoxGenerator([[2]]), (32, 32), 4), 3, True).eval()
    images = torch.rand(2, 3, 32, 32)
    calibrate(quantize(detector, uniform_plan(detector, 8, 8), verbose=False), [images])
    packed = pack(detector, images)
    export_onnx(packed, tmp_path / "m.onnx", images)
    report = verify(tmp_path / "m.onnx", packed, [images], agreement=same_detections)
    assert report.samples >= 2 and report.max_abs_diff < 1e-2


def test_what_is_not_there_is_told() -> None:
    with pytest.raises(RecipeError, match="did you mean 'ssdlite320"):
        library_detector("torchvision:ssdlite320_mobilenet_v3", 3)
    with pytest.raises(RecipeError, match="does not take the options"):
        library_detector(SSD, 3, nonsense=1)
    faster = library_detector(NAMES[3], 3).eval()
    with pytest.raises(DataError, match="training mode"):
        faster(torch.rand(2, 3, 64, 64), TARGETS)
