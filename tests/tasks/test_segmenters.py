from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewbits as fb
from fewbits.errors import CheckpointError, RecipeError
from fewbits.tasks.segmenters import build_segmenter, is_segmenter


@pytest.mark.parametrize("name", ["unet_nano", "torchvision:lraspp_mobilenet_v3_large"])
def test_models_give_logits_of_the_image_size_and_pack(name: str) -> None:
    model, x = build_segmenter(name, 5), torch.randn(2, 3, 64, 64)
    assert is_segmenter(name)
    assert model.eval()(x).shape == (2, 5, 64, 64)
    fb.quantize(model, fb.uniform_plan(model, 4, 8), verbose=False)
    fb.calibrate(model, [x])
    assert torch.equal(fb.pack(model)(x), model.eval()(x))


def test_deeplab_by_name() -> None:
    model = build_segmenter("torchvision:deeplabv3_mobilenet_v3_large", 3).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 48)).shape == (1, 3, 64, 48)


def test_weights_come_from_a_file_under_the_names_of_the_library(tmp_path: Path) -> None:
    name = "torchvision:lraspp_mobilenet_v3_large"
    model = build_segmenter(name, 3)
    state = {key: torch.ones_like(value) for key, value in model.state_dict().items()}
    assert {"backbone.0.0.weight", "classifier.low_classifier.weight"} <= set(state)
    torch.save(state, tmp_path / "w.pt")
    loaded = build_segmenter(name, 3, tmp_path / "w.pt")
    assert all((value == 1).all() for value in loaded.state_dict().values())
    with pytest.raises(CheckpointError, match=r"classifier\.low_classifier"):
        build_segmenter(name, 4, tmp_path / "w.pt")
    build_segmenter(name, 4, tmp_path / "w.pt", ["classifier.*classifier.*"])


def test_unknown_names_and_options_are_told() -> None:
    with pytest.raises(RecipeError, match="own segmenters; did you mean 'unet_nano'"):
        build_segmenter("unet_nan", 3)
    with pytest.raises(RecipeError, match="torchvision's segmenters"):
        build_segmenter("torchvision:resnet18", 3)
    with pytest.raises(RecipeError, match="aux_loss would change nothing"):
        build_segmenter("torchvision:fcn_resnet50", 3, aux_loss=True)
    with pytest.raises(RecipeError, match="does not take the options"):
        build_segmenter("unet_nano", 3, depth=3)
    with pytest.raises(RecipeError, match="two classes"):
        build_segmenter("unet_nano", 1)
    with pytest.raises(RecipeError, match="pretrained_skip"):
        build_segmenter("unet_nano", 3, None, ["head.*"])
    assert not is_segmenter("resnet20") and not is_segmenter("torchvision:resnet18")
