"""Embeddings of texts on disk, by prompt: an encoder is run once for each text, or not at all."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fewbits.errors import DataError
from fewbits.tasks.open_vocabulary.text import TextEncoder

FILE = "embeddings.safetensors"


class CachedText:
    """An encoder whose answers are kept in a folder; see ``cached``."""

    def __init__(self, encoder: TextEncoder, folder: Path) -> None:
        self.encoder, self.file = encoder, folder / FILE
        self._known = _read(self.file, encoder)

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return self.encoder.width

    @property
    def context(self) -> int:
        """Most tokens of a prompt."""
        return self.encoder.context

    @property
    def identity(self) -> str:
        """Names the encoder and its weights."""
        return self.encoder.identity

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return float32 [T, width] of unit length. Raises DataError as the encoder does, or if it cannot write."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            found = dict(zip(new, self.encoder.encode(new)))
            self._known |= found
            _write(self.file, self.encoder, self._known)
        rows = [self._known[prompt] for prompt in prompts]
        return torch.stack(rows) if rows else torch.empty(0, self.width)


def cached(encoder: TextEncoder, folder: str | Path) -> CachedText:
    """Return the encoder with a memory in a folder, which is made if need be.

    Raises DataError if the folder holds embeddings of another encoder, or a file that is damaged.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {str(path)!r} for embeddings: {error}") from error
    return CachedText(encoder, path)


def _read(file: Path, encoder: TextEncoder) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            told = opened.metadata() or {}
            embeddings = opened.get_tensor("embeddings")
        identity, prompts = told["identity"], json.loads(told["prompts"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{file} is no file of embeddings ({error}): delete it, it is made anew") from error
    if identity != encoder.identity:
        raise DataError(
            f"{file} holds embeddings of {identity!r}, this encoder is {encoder.identity!r}: give each its own folder"
        )
    if embeddings.dtype != torch.float32 or list(embeddings.shape) != [len(prompts), encoder.width]:
        raise DataError(
            f"{file} is damaged: {len(prompts)} prompts and embeddings {embeddings.dtype} {list(embeddings.shape)}, "
            f"expected float32 [{len(prompts)}, {encoder.width}]: delete it, it is made anew"
        )
    return dict(zip(prompts, embeddings))


def _write(file: Path, encoder: TextEncoder, known: dict[str, Tensor]) -> None:
    """Write the file, whole or not at all; several processes may do so at once, and the last one's stays."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    told = {"identity": encoder.identity, "prompts": json.dumps(list(known))}
    partial = file.with_name(f"{uuid.uuid4().hex}.partial")
    try:
        save_file({"embeddings": torch.stack(list(known.values()))}, partial, metadata=told)
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"cannot write embeddings to {str(file)!r}: {error}") from error
