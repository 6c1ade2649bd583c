"""Language as a task of recipes: the text, its tokenizer and the float model."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fewbits.errors import DataError, RecipeError, nearest
from fewbits.recipes.images import find_weights
from fewbits.recipes.schema import Data, Recipe
from fewbits.recipes.task import Answer, Pair, Task
from fewbits.tasks.language import LIBRARY, answers, build_language_model, next_token_loss, score
from fewbits.tasks.text import EMBEDDED, TextExamples, read_text, split_text
from fewbits.tasks.tokens import ByteTokenizer, Tokenizer, check_fits, make_tokenizer
from fewbits.tasks.weights import load_weights
from fewbits.train.loop import Loss

OPTIONS = {"tokens": "byte", "context": 256, "test": 0.1}


@dataclass(frozen=True)
class Texts(Task[TextExamples]):
    """Windows of one text: train, validation and test follow each other in it. See ``Task``."""

    headline: ClassVar[str] = "perplexity"
    accuracy: ClassVar[str] = "token_accuracy"
    shown: ClassVar[int] = 4

    tokenizer: Tokenizer = field(default_factory=ByteTokenizer)

    def build(self, recipe: Recipe) -> tuple[nn.Module, tuple[str, ...]]:
        """Build the language model; a GPT takes its vocabulary and context from the data unless the options say more.

        Raises RecipeError for an unknown model, DataError for a tokenizer, context or weights that do not fit it.
        """
        torch.manual_seed(recipe.seed)
        given, options = recipe.model, dict(recipe.model.options)
        if not given.name.startswith(LIBRARY):
            options = {"vocabulary": self.tokenizer.vocabulary, "context": self.train.context, **options}
        model: Any = build_language_model(given.name, **options)
        check_fits(self.tokenizer, model.vocabulary)
        if model.context is not None and self.train.context > model.context:
            raise DataError(
                f"data.options.context is {self.train.context} tokens, but the model {given.name!r} has a context of "
                f"{model.context}; choose at most that"
            )
        if given.weights is None:
            return model, ()
        path = find_weights(given.weights)
        if path is not None:
            load_weights(model, path, given.skip)
            return model, ()
        if not recipe.data.stand_in:
            raise DataError(
                f"the float weights {given.weights!r} are not there, neither as a path nor in ../shared/data; give "
                "their file with --set model.weights=FILE, or train from nothing with --set model.weights=null"
            )
        return model, (f"random weights in place of {given.weights!r}, which is not there",)

    def loss(self, label_smoothing: float = 0.0) -> Loss:
        """See ``Task``."""
        return functools.partial(next_token_loss, label_smoothing=label_smoothing)

    def answers(self, model: Answer, examples: TextExamples, batch_size: int) -> Iterator[Pair]:
        """See ``Task``; batch by batch, as the logits of a text are too many to keep."""
        return answers(model, examples, batch_size)

    def score(self, pairs: Iterable[Pair], examples: TextExamples) -> dict[str, Any]:
        """See ``Task``."""
        return dict(score(pairs, examples.bytes_per_token))

    def some(self, count: int, batch_size: int, seed: int) -> Iterator[Pair]:
        """See ``Task``; windows evenly over the text, whatever the seed."""
        return self.train.batches(min(batch_size, 16), self.train.spread(count))


def load_texts(recipe: Recipe) -> Texts:
    """Read and cut the text that the recipe names. Raises DataError, saying what to do, where it is not there."""
    data, options = recipe.data, _options(recipe.data)
    text, notes = _text(data)
    tokenizer = make_tokenizer(options["tokens"], text)
    first, last = split_text(text, options["test"])
    cut = functools.partial(TextExamples.of, tokenizer=tokenizer, context=options["context"])
    test, validation = cut(last), None
    if data.validation:
        first, held = split_text(first, data.validation)
        validation = cut(held)
    train = cut(first)
    if data.train_examples is not None:
        train = train.first(data.train_examples)
        validation = None if validation is None else validation.first(data.train_examples)
    test = test if data.test_examples is None else test.first(data.test_examples)
    return Texts(train, validation, test, notes, tokenizer)


def _options(data: Data) -> dict[str, Any]:
    for name in data.options:
        if name not in OPTIONS:
            raise RecipeError(f"a text has no option {name!r}{nearest(name, OPTIONS)}; known: {sorted(OPTIONS)}")
    options = {**OPTIONS, **data.options}
    if type(options["context"]) is not int or not isinstance(options["tokens"], str):
        raise RecipeError(f"data.options: context is a whole number and tokens a text, got {data.options}")
    if type(options["test"]) not in (int, float):
        raise RecipeError(f"data.options.test is the last share of the text, above 0 and below 1, got {data.options}")
    return options


def _text(data: Data) -> tuple[str, tuple[str, ...]]:
    """Return the text, and a note where it stands in for another."""
    try:
        return read_text(data.source, None if data.path == "auto" else Path(data.path).expanduser()), ()
    except DataError as error:
        if not data.stand_in or data.path != "auto":
            raise DataError(
                f"{error}. Name a text with --set data.source=text --set data.path=FILE; --smoke runs without"
            ) from error
        return read_text(EMBEDDED), (f"the text {EMBEDDED!r} in place of {data.source!r} ({error})",)
