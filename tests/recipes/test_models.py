from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewbits.errors import RecipeError
from fewbits.recipes.models import cost, named_model, plan_for


def test_the_cost_of_a_small_model_by_hand() -> None:
    model, example = named_model("reference_cnn")
    found = cost(model, example, plan_for(model, None, 2, 4, 8))
    convolutions = [144, 4608, 9216, 18432]
    assert found["weights"] == sum(convolutions) + 640 == sum(row["weights"] for row in found["layers"])
    assert [row["bits"] for row in found["layers"]] == [8, 2, 2, 2, 8]
    macs = [144 * 64, 4608 * 16, 9216 * 16, 18432 * 4, 640]
    assert [row["macs"] for row in found["layers"]] == macs
    assert found["bops"] == sum(m * b for m, b in zip(macs, (64, 8, 8, 8, 64)))
    codes = 144 + 640 + (4608 + 9216 + 18432) // 4
    assert found["bytes"] - codes == pytest.approx(4 * (16 + 32 + 32 + 64 + 10) * 2, abs=48)


def test_channels_and_classes_are_those_asked_for(tmp_path: Path) -> None:
    model, example = named_model("resnet20", classes=7, input_shape=(1, 16, 16))
    assert model(example).shape == (1, 7)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    again, _ = named_model("resnet20", 7, (1, 16, 16), str(tmp_path / "w.pt"))
    assert torch.equal(again.linear.weight, model.linear.weight)


def test_the_cost_of_a_language_model_by_hand() -> None:
    model, example = named_model("gpt_nano", classes=65, input_shape=(16,))
    assert example.shape == (1, 16) and example.dtype == torch.int64
    found = cost(model, example, plan_for(model, None, 4, None, 8))
    linears = 3 * 12 * 48**2
    assert found["weights"] == linears + 65 * 48 + 16 * 48, "the head shares the embedding's weight"
    between = 3 * 2 * 16 * 16 * 48  # of attention, in each of three layers
    assert found["macs"] == 16 * linears + 16 * 65 * 48 + between


def test_a_language_model_has_its_own_shapes(tmp_path: Path) -> None:
    assert named_model("gpt_micro")[1].shape == (1, 128)
    with pytest.raises(RecipeError, match="reads tokens: --input is the length of a window"):
        named_model("gpt_nano", input_shape=(3, 32, 32))
    model, _ = named_model("gpt_nano")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    again, _ = named_model("gpt_nano", weights=str(tmp_path / "w.pt"))
    assert torch.equal(again.head.weight, model.head.weight)


def test_weights_that_are_not_there_are_an_error() -> None:
    with pytest.raises(RecipeError, match="'nothing.pt' does not exist"):
        named_model("resnet20", weights="nothing.pt")


def test_a_segmenter_answers_every_pixel_of_its_image(tmp_path: Path) -> None:
    model, example = named_model("unet_nano", classes=3, input_shape=(3, 32, 48))
    assert model(example).shape == (1, 3, 32, 48)
    first = cost(model, example, plan_for(model, None, 4, 4, 8))["layers"][0]
    assert first["macs"] == 32 * 48 * 27 * 12
    torch.save(model.state_dict(), tmp_path / "w.pt")
    again, _ = named_model("unet_nano", 3, (3, 32, 48), str(tmp_path / "w.pt"))
    assert torch.equal(again.head.weight, model.head.weight)
    with pytest.raises(RecipeError, match="images of 3 channels"):
        named_model("unet_nano", input_shape=(1, 32, 32))


def test_a_detector_reads_images_of_whole_cells(tmp_path: Path) -> None:
    model, example = named_model("detector_nano", 3, (3, 64, 96))
    assert model(example).shape == (1, 96 + 24 + 6, 4 + 3)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    again, _ = named_model("detector_nano", 3, None, str(tmp_path / "w.pt"))
    assert torch.equal(next(again.parameters()), next(model.parameters()))
    for wrong in ((1, 64, 64), (3, 50, 64), (64,)):
        with pytest.raises(RecipeError, match="multiples of 32"):
            named_model("detector_nano", input_shape=wrong)
