"""Small vocabularies and detectors for the tests of this folder."""

from __future__ import annotations

from fewbits.tasks.open_vocabulary.detector import OpenVocabularyDetector
from fewbits.tasks.open_vocabulary.sizes import Size
from fewbits.tasks.open_vocabulary.text import ComposedText
from fewbits.tasks.open_vocabulary.vocabulary import Vocabulary

TINY = Size((8, 8, 16, 32, 32), (1, 1, 1, 1), 1, 8, 16, 16, 16)


def vocabulary(*prompts: str, width: int = 32) -> Vocabulary:
    """Return a vocabulary of composed texts."""
    return Vocabulary.of(ComposedText(width), prompts)


def tiny_detector(*prompts: str, width: int = 32) -> OpenVocabularyDetector:
    """Return a detector of some ten thousand parameters, in eval mode."""
    return OpenVocabularyDetector(TINY, vocabulary(*(prompts or ("cat", "a dog", "red car")), width=width)).eval()
