"""Small vocabularies and detectors for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewbits.tasks.open_vocabulary.detector import OpenVocabularyDetector
from fewbits.tasks.open_vocabulary.sizes import Size
from fewbits.tasks.open_vocabulary.text import ComposedText
from fewbits.tasks.open_vocabulary.vocabulary import Vocabulary

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TINY = Size((8, 8, 16, 32, 32), (1, 1, 1, 1), 1, 8, 16, 16, 16)


def vocabulary(*prompts: str, width: int = 32) -> Vocabulary:
    """Return a vocabulary of composed texts."""
    return Vocabulary.of(ComposedText(width), prompts)


def tiny_detector(*prompts: str, width: int = 32) -> OpenVocabularyDetector:
    """Return a detector of some ten thousand parameters, in eval mode."""
    return OpenVocabularyDetector(TINY, vocabulary(*(prompts or ("cat", "a dog", "red car")), width=width)).eval()


def write_clip(folder: Path) -> Path:
    """Write a CLIP of one narrow layer with random weights, of width 12, whose up to 10 tokens are letters."""
    transformers = pytest.importorskip("transformers")
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=10, projection_dim=12, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)
    return folder
