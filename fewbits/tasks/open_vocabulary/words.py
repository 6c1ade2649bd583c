"""A small world of objects that words compose, some of them never shown in training: "a red striped circle"."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from fewbits.errors import DataError, nearest

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange")
TEXTURES = ("solid", "striped", "dotted", "checkered")
FREQUENCIES = ("frequent", "common", "rare")
LEFT = 2  # base classes that each word keeps, so that it can be learned without the novel ones
Groups = dict[str, tuple[str, ...]]  # the classes of each group by its name; a class may be in several


@dataclass(frozen=True)
class Composition:
    """One class: a thing (a shape or a digit, by its English word) of a colour; shapes have a texture, too."""

    thing: str
    colour: str
    texture: str | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """What it is composed of."""
        return (self.colour, self.thing) if self.texture is None else (self.colour, self.texture, self.thing)

    @property
    def name(self) -> str:
        """The text that names it, such as "a red striped circle" or "an orange seven"."""
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {' '.join(self.words)}"


@dataclass(frozen=True)
class World:
    """All compositions of the given words; which are novel and how often the others are shown follows from ``seed``.

    novel: share of the compositions that no training image shows; each of their words occurs in others. tail: the
    r-th most frequent of the other, the base classes is shown r^-tail times as often as the first (Zipf's law; 0:
    all alike). Raises DataError for words that are unknown or given twice, for numbers that are out of range, and
    where so many novel classes would leave a word in fewer than two base classes of its kind.
    """

    shapes: tuple[str, ...] = SHAPES[:5]
    colours: tuple[str, ...] = COLOURS[:5]
    textures: tuple[str, ...] = TEXTURES[:3]
    digits: tuple[str, ...] = NUMBERS
    novel: float = 0.2
    tail: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, known in (("shapes", SHAPES), ("colours", COLOURS), ("textures", TEXTURES), ("digits", NUMBERS)):
            _check(kind, getattr(self, kind), known)
        if not (0 <= self.novel < 1 and self.tail >= 0):
            raise DataError(f"a world needs 0 <= novel < 1 and tail >= 0, got {self.novel} and {self.tail}")
        if len(self.base) < len(FREQUENCIES):
            raise DataError(f"these words compose {len(self.base)} base classes; give words for three or more")

    @functools.cached_property
    def classes(self) -> tuple[Composition, ...]:
        """Base classes, then novel ones: the label of a base class is the same with and without the novel ones."""
        return self.base + self._novel

    @functools.cached_property
    def base(self) -> tuple[Composition, ...]:
        """The classes that training images show."""
        return tuple(c for family in self._families for c in family if c not in self._novel)

    @functools.cached_property
    def shares(self) -> tuple[float, ...]:
        """How often each base class is shown in training; they add up to 1."""
        ranks = torch.randperm(len(self.base), generator=Generator().manual_seed(self.seed)) + 1
        weights = ranks.double() ** -self.tail
        return tuple((weights / weights.sum()).tolist())

    @functools.cached_property
    def groups(self) -> Groups:
        """Names by group: base and novel, and the base ones by thirds of their rank: frequent, common and rare."""
        ranked = [self.base[i] for i in sorted(range(len(self.base)), key=lambda i: -self.shares[i])]
        found = {"base": self.base, "novel": self._novel}
        for third, name in enumerate(FREQUENCIES):
            found[name] = tuple(ranked[third * len(ranked) // 3 : (third + 1) * len(ranked) // 3])
        return {group: tuple(c.name for c in classes) for group, classes in found.items()}

    @functools.cached_property
    def _families(self) -> tuple[tuple[Composition, ...], ...]:
        """The shapes and the digits."""
        shapes = (Composition(s, c, t) for s in self.shapes for c in self.colours for t in self.textures)
        return tuple(shapes), tuple(Composition(d, c) for d in self.digits for c in self.colours)

    @functools.cached_property
    def _novel(self) -> tuple[Composition, ...]:
        return tuple(c for family in self._families for c in _held_out(family, self.novel, self.seed))


def _held_out(family: Sequence[Composition], share: float, seed: int) -> list[Composition]:
    """Return ``share`` of the compositions by chance, in order, that leave each of their words to ``LEFT`` others."""
    wanted, chosen = round(share * len(family)), set[Composition]()
    uses = {word: sum(word in c.words for c in family) for c in family for word in c.words}
    for index in torch.randperm(len(family), generator=Generator().manual_seed(seed)).tolist():
        words = family[index].words
        if len(chosen) < wanted and all(uses[word] > LEFT for word in words):
            chosen.add(family[index])
            uses.update({word: uses[word] - 1 for word in words})
    if len(chosen) < wanted:
        raise DataError(
            f"novel={share} of {len(family)} compositions such as {family[0].name!r} would leave a word in fewer than "
            f"{LEFT} base classes; ask for at most {len(chosen) / len(family):.2f}, or give more words"
        )
    return [c for c in family if c in chosen]


def _check(kind: str, given: Sequence[str], known: Sequence[str]) -> None:
    for word in given:
        if word not in known:
            raise DataError(f"unknown word {word!r} of {kind}{nearest(str(word), known)}; known: {list(known)}")
    if len(set(given)) < len(given):
        raise DataError(f"the words of {kind} must differ, got {list(given)}")
