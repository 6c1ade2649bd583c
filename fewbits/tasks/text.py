"""Text as training data: where it comes from, and windows of tokens drawn from it.

Nothing is downloaded: a source comes with Python, lies in ``../shared/data`` beside the checkout, or is a path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewbits.errors import DataError, RecipeError, nearest
from fewbits.tasks.data import Batch, Indices, shared_data_dir
from fewbits.tasks.tokens import Tokenizer, make_tokenizer

EMBEDDED = "python_topics"
SHARED = {"tiny_shakespeare": "tinyshakespeare*.txt", "wikitext2": "wikitext2_valid*.txt"}
SOURCES = (EMBEDDED, *SHARED, "text")
SUFFIXES = (".txt", ".md", ".text")


@dataclass(frozen=True, eq=False, kw_only=True)
class TextExamples:
    """A text cut into windows of ``context`` tokens; an example is a window and the token after each of its tokens.

    tokens: int32 [N]. size: bytes of the text in UTF-8. Window i begins at token i * context, so that all windows read
    each token once; in training it begins up to context - 1 tokens later, anew each time. Raises DataError for a text
    too short for one window.
    """

    tokens: Tensor
    context: int
    size: int

    def __post_init__(self) -> None:
        if self.context < 1:
            raise DataError(f"the context must be at least 1 token, got {self.context}")
        if len(self.tokens) <= self.context:
            raise DataError(
                f"a text of {len(self.tokens)} tokens is too short for a window of {self.context} tokens and the one "
                "after it; give a longer text, a smaller context, or other shares for validation and test"
            )

    @staticmethod
    def of(text: str, tokenizer: Tokenizer, context: int) -> TextExamples:
        """Return the windows of a text."""
        tokens = torch.tensor(tokenizer.encode(text), dtype=torch.int32)
        return TextExamples(tokens=tokens, context=context, size=len(text.encode("utf-8")))

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of a token."""
        return self.size / len(self.tokens)

    def gather(self, indices: Indices, generator: torch.Generator | None = None) -> Batch:
        """Return windows int64 [B, context] and the tokens that follow, one step later, of the same shape."""
        starts = torch.as_tensor(indices, dtype=torch.int64) * self.context
        if generator is not None:
            shifts = torch.randint(self.context, (len(starts),), generator=generator)
            starts = (starts + shifts) % (len(self.tokens) - self.context)
        windows = self.tokens[starts[:, None] + torch.arange(self.context + 1)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def first(self, n: int) -> TextExamples:
        """Return the first n windows, or all where there are fewer. Raises DataError unless n >= 1."""
        if n < 1:
            raise DataError(f"cannot take {n} windows; ask for 1 to {len(self)}")
        tokens = self.tokens[: n * self.context + 1]
        return dataclasses.replace(self, tokens=tokens, size=round(len(tokens) * self.bytes_per_token))

    def spread(self, n: int) -> Tensor:
        """Return the indices of n windows, or all where there are fewer, evenly over the text: int64 [n]."""
        n = min(n, len(self))
        return torch.arange(n) * len(self) // n

    def batches(self, batch_size: int, indices: Tensor | None = None) -> Iterator[Batch]:
        """Iterate once over all windows, or those of ``indices``, in order; the last batch may be smaller."""
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {batch_size}")
        chosen = torch.arange(len(self)) if indices is None else indices
        return (self.gather(chunk) for chunk in torch.split(chosen, batch_size))


def load_text(
    source: str = EMBEDDED,
    path: str | Path | None = None,
    *,
    tokens: str = "byte",
    context: int = 256,
    validation: float = 0.1,
) -> tuple[TextExamples, TextExamples, Tokenizer]:
    """Return training windows, validation windows (the last share of the text), and the tokenizer.

    See ``read_text`` for source and path, ``make_tokenizer`` for tokens, and both for what is raised.
    """
    text = read_text(source, path)
    tokenizer = make_tokenizer(tokens, text)
    first, last = split_text(text, validation)
    return TextExamples.of(first, tokenizer, context), TextExamples.of(last, tokenizer, context), tokenizer


def read_text(source: str, path: str | Path | None = None) -> str:
    """Return a whole text.

    source: "python_topics" (the language reference inside Python, about 460 kB of English, by Python version),
    "tiny_shakespeare" or "wikitext2" (path: its file; None: in ../shared/data), or "text": ``path`` is a file in
    UTF-8, or a folder of ``SUFFIXES`` files, read in the order of their names. Raises RecipeError for an unknown
    source, DataError for data that is missing, empty or not UTF-8.
    """
    if source not in SOURCES:
        raise RecipeError(f"unknown text source {source!r}{nearest(source, SOURCES)}; known: {list(SOURCES)}")
    if source == EMBEDDED:
        if path is not None:
            raise DataError(f"{EMBEDDED!r} comes with Python and reads no files, got path={str(path)!r}; leave it out")
        return _python_topics()
    if path is None:
        return "\n".join(_decode(file) for file in _shared(source))
    return "\n".join(_decode(file) for file in _files(Path(path).expanduser()))


def split_text(text: str, fraction: float) -> tuple[str, str]:
    """Return the text without its last ``fraction`` of characters, and these. Raises DataError unless 0 < it < 1."""
    if not 0 < fraction < 1:
        raise DataError(f"a share of a text must be above 0 and below 1, got {fraction}")
    cut = len(text) - round(fraction * len(text))
    return text[:cut], text[cut:]


def _python_topics() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(text.strip() for _, text in sorted(topics.items()))


def _shared(source: str) -> list[Path]:
    folder = shared_data_dir()
    found = sorted((folder / "text").glob(SHARED[source])) if folder is not None and source in SHARED else []
    if not found:
        where = f"and {source!r} is not in ../shared/data beside the checkout" if source in SHARED else "which it needs"
        raise DataError(f"no path was given for the text source {source!r}, {where}; pass the path of a text file")
    return found[:1]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"the text {str(path)!r} does not exist; correct the path")
    found = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in SUFFIXES)
    if not found:
        raise DataError(f"the folder {str(path)!r} holds no {', '.join(SUFFIXES)} file; put the texts there")
    return found


def _decode(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(file)!r} is not UTF-8: byte {error.object[error.start]:#04x} at position {error.start}; convert it, "
            "e.g. with iconv -f latin1 -t utf-8"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {str(file)!r}: {error}") from error
