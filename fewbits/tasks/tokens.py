"""Text to tokens and back: bytes, characters, or a tokenizer file of the ``tokenizers`` library."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fewbits.errors import DataError, RecipeError


class Tokenizer(Protocol):
    """vocabulary: the number of tokens, which are 0..vocabulary - 1."""

    @property
    def vocabulary(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text. Raises DataError for what has no token."""

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens."""


@dataclass(frozen=True)
class ByteTokenizer:
    """The bytes of UTF-8: 256 tokens for any text."""

    vocabulary: int = 256

    def encode(self, text: str) -> list[int]:
        """See ``Tokenizer``."""
        return list(text.encode("utf-8"))

    def decode(self, tokens: list[int]) -> str:
        """See ``Tokenizer``; bytes that are no UTF-8 become the replacement character."""
        return bytes(tokens).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class CharTokenizer:
    """One token a character of ``alphabet``."""

    alphabet: str
    index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", {character: i for i, character in enumerate(self.alphabet)})

    @property
    def vocabulary(self) -> int:
        """The characters of the alphabet."""
        return len(self.alphabet)

    def encode(self, text: str) -> list[int]:
        """See ``Tokenizer``."""
        try:
            return [self.index[character] for character in text]
        except KeyError as error:
            raise DataError(
                f"the character {error.args[0]!r} is not among the {self.vocabulary} of the training text; leave it "
                "out, or train with tokens: byte"
            ) from error

    def decode(self, tokens: list[int]) -> str:
        """See ``Tokenizer``."""
        return "".join(self.alphabet[token] for token in tokens)


@dataclass(frozen=True)
class FileTokenizer:
    """A tokenizer of the ``tokenizers`` library, as ``tokenizer.json`` holds it. No special tokens are added."""

    inner: Any

    @property
    def vocabulary(self) -> int:
        """One more than the largest token: what an embedding must have."""
        return 1 + max(int(token) for token in self.inner.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """See ``Tokenizer``."""
        tokens: list[int] = self.inner.encode(text, add_special_tokens=False).ids
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """See ``Tokenizer``."""
        text: str = self.inner.decode(tokens)
        return text


def make_tokenizer(tokens: str, text: str) -> Tokenizer:
    """Return the tokenizer ``byte``, ``char`` (of the characters in ``text``), or that of a file or folder.

    Raises RecipeError for a name that is neither, DataError for a tokenizer that cannot be read.
    """
    if tokens == "byte":
        return ByteTokenizer()
    if tokens == "char":
        return CharTokenizer("".join(sorted(set(text))))
    path = Path(tokens).expanduser()
    if not path.exists():
        raise RecipeError(
            f"tokens must be 'byte', 'char', or the path of a tokenizer.json or of a folder with one; {tokens!r} does "
            "not exist"
        )
    return _from_file(path / "tokenizer.json" if path.is_dir() else path)


def _from_file(path: Path) -> FileTokenizer:
    if not path.is_file():
        raise DataError(
            f"{str(path.parent)!r} holds no tokenizer.json; save it there with transformers' fast tokenizer: "
            "tokenizer.save_pretrained(folder)"
        )
    try:
        from tokenizers import Tokenizer as Library
    except ImportError as error:
        raise RecipeError(f"{str(path)!r} needs the package tokenizers: pip install 'fewbits[models]'") from error
    try:
        return FileTokenizer(Library.from_file(str(path)))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"cannot read the tokenizer {str(path)!r}: {error}") from error


def check_fits(tokenizer: Tokenizer, embeddings: int) -> None:
    """Raise DataError where a model's embedding has too few entries for a tokenizer."""
    if tokenizer.vocabulary > embeddings:
        raise DataError(
            f"the tokenizer has {tokenizer.vocabulary} tokens, the model's embedding only {embeddings} entries; use "
            f"the tokenizer of the model, or build the model with vocabulary={tokenizer.vocabulary}"
        )
