"""Text from a language model, token by token, with a cache of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbits.errors import DataError
from fewbits.layers import in_eval


class Cache:
    """Keys and values of all tokens so far, a pair [B, heads, length, head size] for each block."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens that were seen by every block."""
        return next((int(key.shape[-2]) for key, _ in self.kept.values()), 0)

    def extend(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens to those of a block, and return all of them."""
        if block in self.kept:
            key, value = (torch.cat(pair, dim=-2) for pair in zip(self.kept[block], (key, value)))
        self.kept[block] = key, value
        return key, value


def generate(
    model: Any,
    tokens: Tensor,
    n: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    cache: bool = True,
) -> Tensor:
    """Return ``tokens`` int64 [B, T], T >= 1, followed by n more that the model chooses: int64 [B, T + n].

    model: a module, [B, T] -> logits [B, T, vocabulary]; float, quantized or packed. temperature: 0 takes the likeliest
    token, the first among equals; above 0 draws from softmax(logits / temperature), of the top_k likeliest if given;
    the same seed draws the same. cache: compute only the new token each time, where the model has ``new_cache``; False
    reads all tokens anew. Both do the same sums, in another order: in float64 the tokens are the same; in float32 the
    rounding may send an activation to the other of two codes, and at one bit another text may follow.

    Raises DataError for no token, tokens outside the vocabulary, more tokens than the model's ``context``, options out
    of range, a top_k that nothing is drawn from (temperature 0), and logits that are NaN.
    """
    _check(model, tokens, n, temperature, top_k)
    generator = torch.Generator().manual_seed(seed)
    kept = model.new_cache() if cache and hasattr(model, "new_cache") else None
    fresh = tokens
    with in_eval(model), torch.no_grad():
        for _ in range(n):
            logits = (model(fresh) if kept is None else model(fresh, kept))[:, -1].float().cpu()
            _require_numbers(logits, tokens.shape[1])
            chosen = _choose(logits, temperature, top_k, generator).to(tokens.device)
            tokens = torch.cat([tokens, chosen], dim=1)
            fresh = tokens if kept is None else chosen
    return tokens


def _require_numbers(logits: Tensor, position: int) -> None:
    if bool(logits.isnan().any()):
        raise DataError(
            f"the logits after token {position} hold NaN: the model's weights are damaged or its training diverged; "
            "evaluate its loss, and look for the first layer with NaN"
        )


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """Return one token for each row of logits [B, V]: int64 [B, 1]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    below = logits - logits.amax(-1, keepdim=True)  # 0 for the likeliest, so that no temperature makes it infinite
    return torch.multinomial((below / temperature).softmax(-1), 1, generator=generator)


def _check(model: Any, tokens: Tensor, n: int, temperature: float, top_k: int | None) -> None:
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
        raise DataError(
            f"generate takes int64 tokens [batch, length] with at least one token, got {tokens.dtype} "
            f"{list(tokens.shape)}; encode a prompt that is not empty"
        )
    if n < 0 or not temperature >= 0 or (top_k is not None and top_k < 1):
        raise DataError(f"need n >= 0, temperature >= 0 and top_k >= 1, got {n}, {temperature} and {top_k}")
    if top_k is not None and temperature == 0:
        raise DataError(f"top_k={top_k} is for drawing: give a temperature above 0, or leave it out")
    context, vocabulary = getattr(model, "context", None), getattr(model, "vocabulary", None)
    end = tokens.shape[1] + n - 1  # the last one is not read any more
    if context is not None and n and end > context:
        raise DataError(
            f"{tokens.shape[1]} tokens and {n} more do not fit the model's context of {context}; generate at most "
            f"{max(0, context + 1 - tokens.shape[1])}, or shorten the prompt"
        )
    if vocabulary is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise DataError(
            f"tokens {int(tokens.min())}..{int(tokens.max())} are outside the model's vocabulary of {vocabulary}; "
            "use the tokenizer that the model was trained with"
        )
