from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewbits.errors import DataError, RecipeError
from fewbits.tasks import text as module
from fewbits.tasks.text import TextExamples, load_text, read_text, split_text
from fewbits.tasks.tokens import ByteTokenizer
from fewbits.train import Batches


def counted(length: int = 101, context: int = 10) -> TextExamples:
    """Tokens 0, 1, 2, ..., so that a token is its position."""
    return TextExamples(tokens=torch.arange(length, dtype=torch.int32), context=context, size=2 * length)


def test_windows_in_order_predict_each_token_but_the_first_once() -> None:
    examples = counted()
    assert len(examples) == 10
    batches = list(examples.batches(4))
    assert [len(tokens) for tokens, _ in batches] == [4, 4, 2]
    tokens, following = (torch.cat(parts) for parts in zip(*batches))
    assert tokens.dtype == torch.int64 and torch.equal(following, tokens + 1)
    assert following.flatten().tolist() == list(range(1, 101))


def test_training_windows_are_shifted_within_the_text_and_reach_all_of_it() -> None:
    examples = counted(105)
    seen: set[int] = set()
    for seed in range(60):
        tokens, following = examples.gather(range(10), torch.Generator().manual_seed(seed))
        assert torch.equal(following, tokens + 1) and torch.equal(tokens[:, 1:], tokens[:, :-1] + 1)
        seen |= set(following.flatten().tolist())
    assert seen == set(range(1, 105))


def test_batches_are_a_function_of_seed_epoch_and_index() -> None:
    source, again = (Batches(counted(), 4, seed=3) for _ in range(2))
    first = source.batch(1, 1)
    source.batch(0, 0)
    assert torch.equal(first[0], again.batch(1, 1)[0])
    assert not torch.equal(first[0], source.batch(2, 1)[0])
    assert not torch.equal(first[0], Batches(counted(), 4, seed=4).batch(1, 1)[0])


def test_a_part_keeps_the_bytes_of_a_token() -> None:
    part = counted().first(3)
    assert len(part) == 3 and len(part.tokens) == 31 and part.bytes_per_token == 2
    assert len(counted().first(99)) == 10
    assert counted().spread(4).tolist() == [0, 2, 5, 7] and counted().spread(20).tolist() == list(range(10))
    with pytest.raises(DataError, match="cannot take 0 windows"):
        counted().first(0)


@pytest.mark.parametrize("length", [0, 10])
def test_a_text_shorter_than_the_context_is_told(length: int) -> None:
    with pytest.raises(DataError, match=f"a text of {length} tokens is too short for a window of 10"):
        counted(length)
    counted(11)


def test_the_split_is_by_position() -> None:
    assert split_text("abcdefghij", 0.3) == ("abcdefg", "hij")
    for share in (0, 1, -0.1):
        with pytest.raises(DataError, match="above 0 and below 1"):
            split_text("abc", share)


def test_the_embedded_text_is_english_that_comes_with_python() -> None:
    train, validation, tokenizer = load_text(context=64, validation=0.2)
    assert isinstance(tokenizer, ByteTokenizer)
    assert train.size + validation.size > 200_000
    assert train.size / (train.size + validation.size) == pytest.approx(0.8, abs=0.001)
    assert tokenizer.decode(train.tokens[:4000].tolist()).count(" the ") > 10
    assert read_text("python_topics") == read_text("python_topics")


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name, content in {"b.txt": "zwei", "a.txt": "eins", "c.md": "drei", "d.bin": "vier"}.items():
        (tmp_path / name).write_text(content)
    assert read_text("text", tmp_path) == "eins\nzwei\ndrei"
    assert read_text("text", tmp_path / "b.txt") == "zwei"


def test_unusable_texts_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.txt"):
        read_text("text", tmp_path)
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin1"))
    with pytest.raises(DataError, match=r"a\.txt' is not UTF-8: byte 0xef at position 2.*iconv"):
        read_text("text", tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        read_text("text", tmp_path / "nothing.txt")
    with pytest.raises(DataError, match="leave it out"):
        read_text("python_topics", tmp_path)
    with pytest.raises(RecipeError, match="unknown text source 'shakespear'.*'tiny_shakespeare'"):
        read_text("shakespear")
    with pytest.raises(DataError, match="no path was given for the text source 'text'"):
        read_text("text")


def test_a_shared_text_is_found_by_name_and_never_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "shared_data_dir", lambda: None)
    with pytest.raises(DataError, match="'tiny_shakespeare' is not in"):
        read_text("tiny_shakespeare")
    (tmp_path / "text").mkdir()
    (tmp_path / "text/tinyshakespeare_x.txt").write_text("To be")
    monkeypatch.setattr(module, "shared_data_dir", lambda: tmp_path)
    assert read_text("tiny_shakespeare") == "To be"
