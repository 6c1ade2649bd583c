from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewbits.errors import DataError, RecipeError
from fewbits.tasks.tokens import ByteTokenizer, CharTokenizer, check_fits, make_tokenizer

TEXT = "Größe: naïve 語 🙂\n"


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """A folder with a byte-level BPE tokenizer of 300 tokens, trained on a few words."""
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.ByteLevelBPETokenizer()
    inner.train_from_iterator(["the cat sat on the mat and the dog sat too " * 20], vocab_size=270, min_frequency=1)
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("tokens", ["byte", "char"])
def test_what_is_encoded_is_decoded(tokens: str) -> None:
    tokenizer = make_tokenizer(tokens, TEXT)
    encoded = tokenizer.encode(TEXT)
    assert tokenizer.decode(encoded) == TEXT
    assert 0 <= min(encoded) <= max(encoded) < tokenizer.vocabulary
    assert tokenizer.vocabulary == (256 if tokens == "byte" else len(set(TEXT)))


def test_bytes_that_are_no_text_do_not_stop_decoding() -> None:
    assert ByteTokenizer().decode([72, 0xC3, 105]) == "H\N{REPLACEMENT CHARACTER}i"


def test_a_character_outside_the_alphabet_is_told() -> None:
    with pytest.raises(DataError, match="character 'z' is not among the 3"):
        CharTokenizer("abc").encode("abz")


def test_a_tokenizer_file_is_read_by_its_path_or_folder(tokenizer_folder: Path) -> None:
    for given in (tokenizer_folder, tokenizer_folder / "tokenizer.json"):
        tokenizer = make_tokenizer(str(given), "")
        encoded = tokenizer.encode("the cat sat, ünlike the dog")
        assert tokenizer.decode(encoded) == "the cat sat, ünlike the dog"
        assert len(encoded) < 24 and tokenizer.vocabulary == 270


def test_added_tokens_count_too(tokenizer_folder: Path) -> None:
    path = tokenizer_folder / "tokenizer.json"
    data = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    data["added_tokens"].append({"id": 300, "content": "<end>", "special": True, **flags})
    path.write_text(json.dumps(data))
    tokenizer = make_tokenizer(str(path), "")
    assert tokenizer.encode("<end>") == [tokenizer.vocabulary - 1] and tokenizer.vocabulary > 270


def test_what_is_no_tokenizer_is_told(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(RecipeError, match="'byte', 'char', or the path"):
        make_tokenizer("chars", "")
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        make_tokenizer(str(tmp_path), "")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        make_tokenizer(str(tmp_path), "")


def test_a_vocabulary_larger_than_the_embedding_is_told() -> None:
    check_fits(ByteTokenizer(), 256)
    with pytest.raises(DataError, match="tokenizer has 256 tokens, the model's embedding only 255"):
        check_fits(ByteTokenizer(), 255)
