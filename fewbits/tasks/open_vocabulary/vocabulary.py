"""The texts that a detector looks for, with their embeddings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import DataError
from fewbits.tasks.open_vocabulary.text import TextEncoder, check_prompts

UNIT_TOLERANCE = 1e-3  # how far the length of an embedding may be from 1


@dataclass(frozen=True)
class Vocabulary:
    """prompts: T different texts. embeddings: float32 [T, D] of unit length. identity: the encoder that made them.

    Raises DataError for no prompt, an empty one or one given twice, and for embeddings of another count or length.
    """

    prompts: tuple[str, ...]
    embeddings: Tensor
    identity: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if not self.prompts:
            raise DataError("a vocabulary needs at least one prompt, got none")
        if twice := [prompt for prompt, count in Counter(self.prompts).items() if count > 1]:
            raise DataError(
                f"the prompt {twice[0]!r} is given twice ({len(twice)} are): a class has one text, drop one"
            )
        check_prompts(self.prompts, lambda prompt: 0, 0)
        found = self.embeddings
        if found.ndim != 2 or len(found) != len(self.prompts) or found.dtype != torch.float32:
            raise DataError(
                f"embeddings must be float32 [{len(self.prompts)}, D], one row a prompt, got {found.dtype} "
                f"{list(found.shape)}"
            )
        length = found.norm(dim=1)
        wrong = ~((length - 1).abs() < UNIT_TOLERANCE)  # also where it is NaN
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise DataError(
                f"the embedding of {self.prompts[first]!r} has length {float(length[first]):.4g}, expected 1: "
                "normalise it first"
            )

    @staticmethod
    def of(encoder: TextEncoder, prompts: Sequence[str]) -> Vocabulary:
        """Encode prompts. Raises DataError as the class does, and for a prompt beyond the encoder's context."""
        prompts = tuple(prompts)
        return Vocabulary(prompts, encoder.encode(prompts) if prompts else torch.empty(0, 1), encoder.identity)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def width(self) -> int:
        """D, the width of the embeddings."""
        return int(self.embeddings.shape[1])
