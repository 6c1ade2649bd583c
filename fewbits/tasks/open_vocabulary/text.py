"""Text encoders: prompts to embeddings of unit length. Ours composes words; CLIP's is read from a folder; a cache.

A text encoder is frozen and never quantized: what a detector needs of it are the embeddings of its vocabulary.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import DataError

WIDTH = 512  # of CLIP ViT-B/32, which YOLO-World reads
CONTEXT = 77  # tokens of CLIP
ARTICLES = frozenset(("a", "an", "the"))
WORD = re.compile(r"[^\W_]+")


class TextEncoder(Protocol):
    """width: D. context: the most tokens, or words, of a prompt. identity: names the encoder and its weights."""

    @property
    def width(self) -> int: ...

    @property
    def context(self) -> int: ...

    @property
    def identity(self) -> str: ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return float32 [T, D] of unit length. Raises DataError for an empty prompt or one beyond the context."""
        ...


class ComposedText:
    """The normalised sum of a fixed random vector for each different word: any word works, the order means nothing.

    A text that was never seen is the sum of words that were, so a detector can learn to find "a red square" from red
    circles and blue squares. Articles are left out; case, hyphens and underscores do not matter.
    """

    def __init__(self, width: int = WIDTH, seed: int = 0, context: int = CONTEXT) -> None:
        if width < 1 or context < 1:
            raise DataError(f"width and context must be at least 1, got {width} and {context}")
        self.width, self.seed, self.context = width, seed, context
        self._vectors: dict[str, Tensor] = {}

    @property
    def identity(self) -> str:
        """Names the encoder and its weights, which follow from the seed."""
        return f"composed text, width {self.width}, seed {self.seed}"

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return float32 [T, width] of unit length. Raises DataError for a prompt without a word, or too long."""
        check_prompts(prompts, lambda prompt: len(WORD.findall(prompt)), self.context)
        return torch.stack([self._encode(prompt) for prompt in prompts]) if prompts else torch.empty(0, self.width)

    def _encode(self, prompt: str) -> Tensor:
        words = sorted(set(WORD.findall(prompt.lower())) - ARTICLES)  # sorted: equal to the last bit in any order
        if not words:
            raise DataError(f"the prompt {prompt!r} has no word but articles: name what to look for")
        return F.normalize(torch.stack([self._vector(word) for word in words]).sum(0), dim=0)

    def _vector(self, word: str) -> Tensor:
        """Return the vector of a word, of unit length: from a generator that the word and our seed start."""
        if word not in self._vectors:
            digest = hashlib.blake2b(f"{self.seed}:{word}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
            self._vectors[word] = F.normalize(torch.randn(self.width, generator=generator), dim=0)
        return self._vectors[word]


class ClipText:
    """The text tower of a CLIP of transformers, frozen, in float32.

    source: a folder with model and tokenizer, or a name that transformers has in its cache: nothing is downloaded.
    batch: prompts encoded at a time. Raises DataError where it cannot be read.
    """

    def __init__(self, source: str, batch: int = 256) -> None:
        try:
            from transformers import AutoTokenizer, CLIPTextModelWithProjection
        except ImportError as error:
            raise DataError("ClipText needs transformers: pip install 'fewbits[models]'") from error
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source, local_files_only=True)
            model = CLIPTextModelWithProjection.from_pretrained(source, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(
                f"cannot read a CLIP text model from {source!r}: {reason}; give a folder with config.json, weights and "
                "tokenizer"
            ) from error
        self.model: Any = model.float().eval().requires_grad_(False)
        self.batch = batch
        self.width = int(self.model.config.projection_dim)
        self.context = int(self.model.config.max_position_embeddings)
        self.identity = f"CLIP text, width {self.width}, weights {_digest(self.model)}"

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return float32 [T, width] of unit length. Raises DataError for an empty prompt, or one with too many
        tokens."""
        check_prompts(prompts, lambda prompt: len(self.tokenizer(prompt).input_ids), self.context)
        if not prompts:
            return torch.empty(0, self.width)
        found = [self._encode(list(prompts[i : i + self.batch])) for i in range(0, len(prompts), self.batch)]
        return torch.cat(found)

    def _encode(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(prompts, padding=True, return_tensors="pt")
        with torch.no_grad():
            return F.normalize(self.model(**tokens).text_embeds, dim=-1)


def check_prompts(prompts: Sequence[str], length: Callable[[str], int], context: int) -> None:
    """Raise DataError for a prompt that is empty, or whose length is beyond the context."""
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"a prompt must be a text that is not empty, got {prompt!r}")
        if (count := length(prompt)) > context:
            raise DataError(
                f"the prompt {prompt[:60]!r} has {count} tokens, the text encoder reads {context}: shorten it, a rest "
                "would be cut off unseen"
            )


def _digest(model: Any) -> str:
    """Return the beginning of a SHA-256 of all weights."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()[:12]
