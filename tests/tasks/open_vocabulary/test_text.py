from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewbits.errors import DataError
from fewbits.tasks.open_vocabulary.text import ClipText, ComposedText
from tests.tasks.open_vocabulary.made import write_clip

CAT = [-0.814644, -0.140765, 0.060234, -0.559385]  # as the first release had it


def test_embeddings_compose() -> None:
    text = ComposedText(256)
    red, square, red_square, both = text.encode(["red", "square", "a red square", "the Square, red"])
    assert torch.equal(red_square, both)
    torch.testing.assert_close(red_square, (red + square) / (red + square).norm())
    assert all(torch.equal(text.encode([word])[0], red) for word in ("RED", "a red", "red-red", "red_the"))
    length = text.encode(["one", "two words", "three words here"]).norm(dim=1)
    torch.testing.assert_close(length, torch.ones(3))


def test_words_are_nearly_orthogonal_and_shared_words_near() -> None:
    found = ComposedText().encode([f"word{i}" for i in range(40)])
    cosine = found @ found.T - torch.eye(40)
    assert cosine.abs().max() < 0.25
    one, other, far = ComposedText().encode(["red circle", "red square", "blue ring"])
    assert 0.35 < one @ other < 0.65 and (one @ far).abs() < 0.25


def test_embeddings_follow_from_word_width_and_seed_alone() -> None:
    found = ComposedText(4).encode(["cat"])
    torch.testing.assert_close(found, torch.tensor([CAT]), atol=1e-6, rtol=0)  # files of embeddings rely on it
    torch.manual_seed(5)
    assert torch.equal(found, ComposedText(4).encode(["dog", "cat"])[1:])
    assert not torch.equal(found, ComposedText(4, seed=1).encode(["cat"]))
    assert ComposedText(4).identity != ComposedText(4, seed=1).identity != ComposedText(8, seed=1).identity


def test_prompts_that_cannot_be_encoded() -> None:
    text = ComposedText(8, context=3)
    assert text.encode([]).shape == (0, 8) and text.encode(["ein schöner Vogel", "鳥"]).shape == (2, 8)
    for wrong in ("", "  "):
        with pytest.raises(DataError, match="not empty"):
            text.encode(["cat", wrong])
    with pytest.raises(DataError, match="has 4 tokens, the text encoder reads 3"):
        text.encode(["a very big cat"])
    with pytest.raises(DataError, match="no word but articles"):
        text.encode(["the"])
    with pytest.raises(DataError, match="no word but articles"):
        text.encode(["!?"])
    with pytest.raises(DataError, match="at least 1, got 0"):
        ComposedText(0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CLIP of one narrow layer."""
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_clip_from_a_folder(clip: Path) -> None:
    text = ClipText(str(clip), batch=2)
    assert (text.width, text.context) == (12, 10)
    found = text.encode(["cat", "a", "red car"])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(
        found, torch.cat([text.encode([p]) for p in ("cat", "a", "red car")])
    )  # padding is unseen
    tokens = text.tokenizer("cat", return_tensors="pt")
    direct = text.model(**tokens).text_embeds[0]
    torch.testing.assert_close(found[0], direct / direct.norm())
    assert text.encode([]).shape == (0, 12)
    with pytest.raises(DataError, match="has 12 tokens, the text encoder reads 10"):
        text.encode(["bigyellowx"])


def test_the_identity_of_clip_is_that_of_its_weights(clip: Path) -> None:
    text, again = ClipText(str(clip)), ClipText(str(clip))
    assert text.identity == again.identity and text.identity.startswith("CLIP text, width 12, weights ")
    again.model.text_projection.weight.data[0, 0] += 1
    again.model.save_pretrained(clip.parent / "other")
    again.tokenizer.save_pretrained(clip.parent / "other")
    assert ClipText(str(clip.parent / "other")).identity != text.identity


def test_no_clip_there(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(DataError, match=r"cannot read a CLIP text model from .*config.json"):
        ClipText(str(tmp_path))
