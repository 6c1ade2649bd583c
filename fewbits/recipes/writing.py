"""Letting the language model of a finished run write, and timing it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import DataError, RecipeError
from fewbits.recipes.revisit import Finished, torch_threads
from fewbits.recipes.texts import Texts
from fewbits.tasks.generate import generate

USUAL = 64  # tokens, where the context has room for them
WARM_UP = 2


def write_text(target: Path, prompt: str, count: int | None, threads: int, temperature: float = 0.0) -> dict[str, Any]:
    """Continue a prompt with the packed model of a run, and with its float model for comparison.

    count: tokens to write; None: 64, or what the context leaves. temperature: 0 is greedy. Returns the text, and tokens
    a second of both models, the reading of the prompt included. Raises RecipeError for a run of another task, DataError
    for a prompt that is empty, too long, or not in the tokenizer's alphabet.
    """
    run = Finished.open(target)
    if not isinstance(run.task, Texts):
        raise RecipeError(f"only a language model writes, the run in {str(target)!r} is of task {run.recipe.task!r}")
    tokenizer, packed, original = run.task.tokenizer, run.packed(), run.float_model()
    tokens = torch.tensor([tokenizer.encode(prompt)], dtype=torch.int64)
    wanted = _count(packed, tokens, count)
    with torch_threads(threads):
        seconds, written = _timed(packed, tokens, wanted, temperature)
        float_seconds, _ = _timed(original, tokens, wanted, temperature)
    return {
        "prompt": prompt,
        "text": tokenizer.decode(written[0, tokens.shape[1] :].tolist()),
        "tokens": wanted,
        "tokens_per_second": wanted / seconds,
        "float_tokens_per_second": wanted / float_seconds,
        "threads": threads,
    }


def _count(model: Any, tokens: Tensor, count: int | None) -> int:
    if count is not None:
        return count  # ``generate`` tells where it does not fit
    room = USUAL if model.context is None else model.context + 1 - tokens.shape[1]
    if room < 1:
        raise DataError(f"the prompt of {tokens.shape[1]} tokens fills the context of {model.context}; shorten it")
    return min(USUAL, room)


def _timed(model: Any, tokens: Tensor, count: int, temperature: float) -> tuple[float, Tensor]:
    generate(model, tokens, min(WARM_UP, count))
    start = time.perf_counter()
    written = generate(model, tokens, count, temperature=temperature)
    return time.perf_counter() - start, written
