from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewbits.cli import main
from fewbits.deploy import pack, save
from fewbits.errors import DataError, PackedFileError
from fewbits.layers import calibrate, quantize
from fewbits.recipes.detecting import detect, pictured
from fewbits.report.pictures import class_colours
from fewbits.tasks.detection_metrics import Detections
from fewbits.tasks.open_vocabulary import sizes
from fewbits.tasks.open_vocabulary.packed import AskedDetector, Card
from fewbits.tasks.open_vocabulary.policy import policy_4_4_8
from fewbits.tasks.open_vocabulary.text import ComposedText
from tests.tasks.open_vocabulary.made import TINY, tiny_detector


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector that was never trained, packed."""
    model, path = tiny_detector("cat"), tmp_path_factory.mktemp("detect") / "model.safetensors"
    quantize(model, policy_4_4_8(model), verbose=False)
    calibrate(model, [torch.randn(2, 3, 64, 64)])
    card = Card("tiny", "composed", 32, ComposedText(32).identity, (64, 64), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    save(pack(model), path, card.about())
    return path


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that is packed in a moment."""
    monkeypatch.setitem(sizes.SIZES, "tiny", TINY)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A picture of noise, wider than high."""
    noise = torch.randint(256, (40, 90, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_a_picture_and_what_was_found_on_it_come_from_a_file_and_words(packed_file: Path, image: Path) -> None:
    out = image.with_name("out.png")
    told = detect(packed_file.parent, image, "a red square,  a striped circle ", out, score=0.0)
    assert told["prompts"] == ["a red square", "a striped circle"] and told["found"]
    scores = [row["score"] for row in told["found"]]
    assert scores == sorted(scores, reverse=True) and {row["prompt"] for row in told["found"]} == set(told["prompts"])
    pixels = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)
    want = AskedDetector.open(packed_file).find(pixels, told["prompts"], 0.0)
    assert told["found"][0]["box"] == want.boxes[0].tolist()
    assert Image.open(out).size == (7 * 90, 7 * 40)
    assert detect(packed_file, image, "cat", out, score=0.9)["found"] == []
    again = np.asarray(Image.open(out).resize((90, 40), Image.Resampling.NEAREST))
    assert np.array_equal(again, np.array(Image.open(image))), "nothing is drawn where nothing is found"


def test_boxes_have_the_colour_of_their_prompt_and_their_words() -> None:
    found = Detections(torch.tensor([[10.0, 30, 60, 70]]), torch.tensor([0.5]), torch.tensor([1]))
    picture = np.asarray(pictured(torch.full((3, 80, 80), 128, dtype=torch.uint8), found, ["a", "b"]))
    colour = np.array(class_colours(3)[2])
    ys, xs = (picture == colour).all(-1).nonzero()
    assert picture.shape == (640, 640, 3) and (xs.min(), ys.max()) == (8 * 10 - 1, 8 * 70 - 1)
    assert ys.min() < 8 * 30 - 5, "words stand above the box"
    assert not (picture[300:500, 150:400] == colour).all(-1).any()


def test_what_cannot_be_looked_at_is_told(packed_file: Path, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    with pytest.raises(DataError, match="a prompt must be a text that is not empty"):
        detect(packed_file, image, "cat,, dog", out)
    with pytest.raises(DataError, match="'cat' is given twice"):
        detect(packed_file, image, "cat, cat", out)
    with pytest.raises(DataError, match="does not exist or is no file"):
        detect(packed_file, tmp_path / "none.png", "cat", out)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match="cannot decode the image"):
        detect(packed_file, tmp_path / "text.png", "cat", out)
    with pytest.raises(PackedFileError, match="cannot read"):
        detect(tmp_path, image, "cat", out)
    with pytest.raises(DataError, match="cannot read a CLIP text model from 'nowhere/clip'"):
        detect(packed_file, image, "cat", out, encoder="nowhere/clip")
    assert not out.exists()
    with pytest.raises(DataError, match="cannot write the picture .*name a .png or .jpg file"):
        detect(packed_file, image, "cat", tmp_path / "out.xyz")


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (2, 3000)])
def test_images_of_extreme_aspect_are_looked_at(packed_file: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (200, 30, 30)).save(tmp_path / "image.png")
    told = detect(packed_file, tmp_path / "image.png", "cat", tmp_path / "out.png", score=0.0)
    assert told["found"] and Image.open(tmp_path / "out.png").size[0] >= size[0]


def test_the_command_tells_it_as_json_and_as_lines(
    packed_file: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = image.with_name("out.png")
    given = ["detect", str(packed_file), str(image), "--text", "a cat, a bus", "--score", "0", "--out", str(out)]
    with pytest.raises(SystemExit) as done:
        main([*given, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert done.value.code == 0 and told == detect(packed_file, image, "a cat, a bus", out, 0.0)
    with pytest.raises(SystemExit):
        main(given)
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"{len(told['found'])} found, drawn into {out}" and len(lines) == len(told["found"])
    with pytest.raises(SystemExit) as done:
        main([*given[:3], "--text", "", "--out", str(out)])
    assert str(done.value.code).startswith("error: a prompt must be a text")
