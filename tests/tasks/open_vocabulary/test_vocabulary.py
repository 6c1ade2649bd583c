from __future__ import annotations

import dataclasses

import pytest
import torch

from fewbits.errors import DataError
from fewbits.tasks.open_vocabulary.text import ComposedText
from fewbits.tasks.open_vocabulary.vocabulary import Vocabulary


def test_a_vocabulary_of_prompts() -> None:
    found = Vocabulary.of(ComposedText(16), ["cat", "a red dog"])
    assert found.prompts == ("cat", "a red dog") and len(found) == 2 and found.width == 16
    assert torch.equal(found.embeddings, ComposedText(16).encode(["cat", "a red dog"]))
    assert found.identity == ComposedText(16).identity


def test_prompts_that_are_refused() -> None:
    text = ComposedText(16, context=2)
    with pytest.raises(DataError, match="at least one prompt, got none"):
        Vocabulary.of(text, [])
    with pytest.raises(DataError, match=r"'cat' is given twice"):
        Vocabulary.of(text, ["cat", "dog", "cat"])
    with pytest.raises(DataError, match="not empty, got ' '"):
        Vocabulary.of(text, ["cat", " "])
    with pytest.raises(DataError, match="has 3 tokens"):
        Vocabulary.of(text, ["one two three"])


def test_embeddings_that_are_refused() -> None:
    good = Vocabulary.of(ComposedText(16), ["cat", "dog"])
    with pytest.raises(DataError, match=r"not empty, got ''"):
        dataclasses.replace(good, prompts=("cat", ""))
    for wrong in (good.embeddings[:1], good.embeddings[0], good.embeddings.double()):
        with pytest.raises(DataError, match=r"float32 \[2, D\], one row a prompt"):
            dataclasses.replace(good, embeddings=wrong)
    for factor in (2.0, float("nan"), 0.0):
        scaled = good.embeddings.clone()
        scaled[1] *= factor
        with pytest.raises(DataError, match="embedding of 'dog' has length"):
            dataclasses.replace(good, embeddings=scaled)
