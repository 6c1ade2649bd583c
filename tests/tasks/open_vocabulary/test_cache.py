from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits.errors import DataError
from fewbits.tasks.open_vocabulary.cache import FILE, cached
from fewbits.tasks.open_vocabulary.text import ComposedText
from fewbits.tasks.open_vocabulary.vocabulary import Vocabulary


class Counting(ComposedText):
    """Remembers what it was asked."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.asked: list[str] = []

    def encode(self, prompts: Sequence[str]) -> Tensor:
        self.asked += prompts
        return super().encode(prompts)


def test_each_prompt_is_encoded_once_also_by_the_next_run(tmp_path: Path) -> None:
    first = Counting()
    memory = cached(first, tmp_path / "texts")
    want = memory.encode(["cat", "dog", "cat"])
    assert torch.equal(want, ComposedText(8).encode(["cat", "dog", "cat"])) and first.asked == ["cat", "dog"]
    second = Counting()
    memory = cached(second, tmp_path / "texts")
    assert torch.equal(memory.encode(["dog", "kite", "cat"])[[2, 0]], want[:2]) and second.asked == ["kite"]
    assert memory.encode([]).shape == (0, 8)
    assert (memory.width, memory.context, memory.identity) == (8, 77, first.identity)
    assert Vocabulary.of(memory, ["kite", "cat"]).identity == first.identity and second.asked == ["kite"]
    assert [path.name for path in (tmp_path / "texts").iterdir()] == [FILE]


def test_embeddings_of_another_encoder_are_refused(tmp_path: Path) -> None:
    cached(ComposedText(8), tmp_path).encode(["cat"])
    with pytest.raises(DataError, match=r"embeddings of 'composed text, width 8, seed 0', this encoder is .*seed 1"):
        cached(ComposedText(8, seed=1), tmp_path)


def test_a_damaged_file_and_a_folder_that_is_none(tmp_path: Path) -> None:
    cached(ComposedText(8), tmp_path).encode(["cat"])
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-3])
    with pytest.raises(DataError, match="delete it, it is made anew"):
        cached(ComposedText(8), tmp_path)
    with pytest.raises(DataError, match="cannot make the folder"):
        cached(ComposedText(8), tmp_path / FILE / "below")


def test_two_that_write_at_once_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import torch as library

    first, second, save_file = cached(Counting(), tmp_path), cached(Counting(), tmp_path), library.save_file

    def meanwhile(*args: Any, **kwargs: Any) -> None:
        save_file(*args, **kwargs)
        monkeypatch.setattr(library, "save_file", save_file)
        second.encode(["dog"])

    monkeypatch.setattr(library, "save_file", meanwhile)
    first.encode(["cat"])
    later = Counting()
    assert torch.equal(cached(later, tmp_path).encode(["cat"]), ComposedText(8).encode(["cat"])) and not later.asked
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_prompt_that_cannot_be_encoded_is_not_kept(tmp_path: Path) -> None:
    memory = cached(ComposedText(8), tmp_path)
    with pytest.raises(DataError, match="not empty"):
        memory.encode(["cat", " "])
    assert not (tmp_path / FILE).exists() and memory.encode(["cat"]).shape == (1, 8)
