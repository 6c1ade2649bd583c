from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch

from fewbits.deploy import pack, save
from fewbits.errors import DataError, PackedFileError
from fewbits.layers import calibrate, quantize
from fewbits.tasks.data import normalize
from fewbits.tasks.detection_metrics import Limits, detections
from fewbits.tasks.open_vocabulary import sizes
from fewbits.tasks.open_vocabulary.detector import OpenVocabularyDetector
from fewbits.tasks.open_vocabulary.packed import AskedDetector, Card, letterboxed, text_encoder
from fewbits.tasks.open_vocabulary.policy import policy_4_4_8
from fewbits.tasks.open_vocabulary.text import ComposedText
from fewbits.tasks.open_vocabulary.vocabulary import Vocabulary
from tests.tasks.open_vocabulary.made import TINY, tiny_detector, vocabulary, write_clip

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
CARD = Card("tiny", "composed", 32, ComposedText(32).identity, (64, 64), MEAN, STD)
ALL = -1.0  # a score that everything has


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that is packed in a moment."""
    monkeypatch.setitem(sizes.SIZES, "tiny", TINY)


def trained() -> OpenVocabularyDetector:
    """Return a quantized detector of which no two answers are alike."""
    return copy.deepcopy(_trained())


@functools.cache
def _trained() -> OpenVocabularyDetector:
    with torch.random.fork_rng():  # a test draws the same numbers whether it is the first or not
        torch.manual_seed(0)
        model = tiny_detector("cat", "a dog")
        quantize(model, policy_4_4_8(model), verbose=False)
        calibrate(model, [torch.randn(4, 3, 64, 64)])
    for head in model.heads:
        head.shift.data.zero_()
    return model


def saved(model: OpenVocabularyDetector, path: Path, card: Card = CARD) -> Path:
    save(pack(model), path, card.about())
    return path


def test_a_packed_file_alone_finds_for_any_words_what_the_trained_model_does(tmp_path: Path) -> None:
    model, words = trained(), ["a green ring", "cup", "old red bus"]
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    asked = AskedDetector.open(saved(model, tmp_path / "m.safetensors"))
    got = asked.find(image, words, ALL)
    model.set_vocabulary(vocabulary(*words))
    with torch.no_grad():
        want = detections(model(normalize(image[None], MEAN, STD)), Limits(ALL))[0]
    assert torch.equal(got.scores, want.scores) and torch.equal(got.labels, want.labels) and len(got.labels) > 20
    assert torch.equal(got.boxes, want.boxes.clamp(0, 64))
    again = asked.find(image, ["another cup"], ALL)
    assert set(again.labels.tolist()) == {0} and not torch.equal(again.scores[:5], got.scores[:5])


@pytest.mark.parametrize("size", [(1, 1), (2, 3000), (3000, 2), (50, 40), (300, 200)])
def test_images_of_any_shape_are_looked_at_in_their_own_pixels(tmp_path: Path, size: tuple[int, int]) -> None:
    asked = AskedDetector.open(saved(trained(), tmp_path / "m.safetensors"))
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    found = asked.find(image, ["cat"], ALL)
    (height, width), (inputs, zoom) = size, letterboxed(image, (64, 64), MEAN, STD)
    with torch.no_grad():
        boxes = detections(asked.model(inputs[None]), Limits(ALL))[0].boxes
    assert len(boxes) and bool((found.boxes >= 0).all())
    torch.testing.assert_close(found.boxes[:, 0::2], (boxes[:, 0::2] / zoom[0]).clamp(0, width))
    torch.testing.assert_close(found.boxes[:, 1::2], (boxes[:, 1::2] / zoom[1]).clamp(0, height))


def test_a_letterbox_keeps_the_aspect_and_fills_with_the_mean() -> None:
    image = torch.full((3, 30, 60), 255, dtype=torch.uint8)
    inputs, zoom = letterboxed(image, (64, 96), MEAN, STD)
    torch.testing.assert_close(zoom, torch.tensor([1.6, 1.6, 1.6, 1.6]))
    white = torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD)])
    torch.testing.assert_close(inputs[:, :48], white[:, None, None].expand(3, 48, 96))
    assert not inputs[:, 48:].any()
    _, zoom = letterboxed(torch.zeros(3, 2, 3000, dtype=torch.uint8), (64, 96), MEAN, STD)
    torch.testing.assert_close(zoom, torch.tensor([96 / 3000, 0.5, 96 / 3000, 0.5]))
    same, one = letterboxed(torch.randint(256, (3, 64, 64), dtype=torch.uint8), (64, 64), MEAN, STD)
    assert torch.equal(one, torch.ones(4)) and same.shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt"),
        (["cat", ""], "not empty"),
        (["cat", "cat"], "given twice"),
        (["the"], "no word but"),
    ],
)
def test_prompts_that_are_no_vocabulary_are_refused(tmp_path: Path, prompts: list[str], message: str) -> None:
    asked = AskedDetector.open(saved(trained(), tmp_path / "m.safetensors"))
    with pytest.raises(DataError, match=message):
        asked.find(torch.zeros(3, 8, 8, dtype=torch.uint8), prompts)


def test_files_that_cannot_be_asked_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "m.safetensors", trained()
    save(pack(model), path)
    with pytest.raises(PackedFileError, match="holds no open-vocabulary detector"):
        AskedDetector.open(path)
    save(pack(model), path, {**CARD.about(), "kind": "classifier"})
    with pytest.raises(PackedFileError, match="holds no open-vocabulary detector"):
        AskedDetector.open(path)
    save(pack(model), path, {key: value for key, value in CARD.about().items() if key != "side"})
    with pytest.raises(PackedFileError, match="does not tell how to build its detector .'side'.: pack it again"):
        AskedDetector.open(path)
    save(pack(model), path, {**CARD.about(), "size": "xxl"})
    with pytest.raises(PackedFileError, match="size 'xxl', known: .*'nano'"):
        AskedDetector.open(path)
    save(pack(model), path, {**CARD.about(), "size": "s"})
    with pytest.raises(PackedFileError, match="another architecture"):
        AskedDetector.open(path)


def test_an_encoder_that_is_not_that_of_training_is_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "m.safetensors", trained()
    save(pack(model), path, {**CARD.about(), "text": str(tmp_path / "clip"), "identity": "CLIP text, width 32"})
    with pytest.raises(DataError, match="cannot read a CLIP.*The detector reads 'CLIP text, width 32'.*--encoder"):
        AskedDetector.open(path)
    with pytest.raises(
        DataError, match="trained with texts of 'CLIP text, width 32', 'composed' is 'composed text, wi"
    ):
        AskedDetector.open(path, "composed")
    with pytest.raises(DataError, match="leave the width 64 out"):
        text_encoder("some/folder", 64)
    assert Vocabulary.of(text_encoder("composed"), ["cat"]).width == 512


def test_a_clip_that_has_moved_is_named_and_another_one_refused(tmp_path: Path) -> None:
    moved, other = (tmp_path / "moved", tmp_path / "other")
    for folder in (moved, other):
        folder.mkdir()
        write_clip(folder)
    encoder = text_encoder(str(moved))
    model = OpenVocabularyDetector(TINY, Vocabulary.of(encoder, ["dog"])).eval()
    quantize(model, policy_4_4_8(model), verbose=False)
    calibrate(model, [torch.randn(2, 3, 64, 64)])
    card = Card("tiny", str(tmp_path / "gone"), 12, encoder.identity, (64, 64), MEAN, STD)
    path, image = saved(model, tmp_path / "m.safetensors", card), torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    with pytest.raises(DataError, match="cannot read a CLIP text model from .*gone"):
        AskedDetector.open(path)
    asked = AskedDetector.open(path, str(moved))
    model.set_vocabulary(Vocabulary.of(encoder, ["cat", "red bus"]))
    with torch.no_grad():
        want = detections(model(normalize(image[None], MEAN, STD)), Limits(ALL))[0]
    assert torch.equal(asked.find(image, ["cat", "red bus"], ALL).scores, want.scores)
    with pytest.raises(DataError, match="has 12 tokens, the text encoder reads 10"):
        asked.find(image, ["bigyellowx"])
    text = text_encoder(str(other))
    text.model.text_projection.weight.data[0, 0] += 1  # type: ignore[attr-defined]
    text.model.save_pretrained(other)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="the detector was trained with texts of 'CLIP text, width 12, weights"):
        AskedDetector.open(path, str(other))
