"""Finding, reading and writing recipes."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fewbits.errors import RecipeError, nearest
from fewbits.recipes.schema import Recipe

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the names of the recipes that come with fewbits."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(recipe: str) -> Path:
    """Return the file of a recipe, given by name or by path. Raises RecipeError, with near names, for another."""
    own, path = FOLDER / f"{recipe}.yaml", Path(recipe).expanduser()
    if recipe in names():
        return own
    if path.is_file():
        return path
    hint = nearest(recipe, names())
    raise RecipeError(f"there is no recipe {recipe!r}{hint}; known: {', '.join(names())}, or give the path of a file")


def read(path: Path, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe; ``changes`` like ``qat.epochs=3`` win over the file, their values are YAML.

    Raises RecipeError, naming file, key and nearest known key, for what is malformed or unknown.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot read the recipe {str(path)!r}: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with 'data', 'model' and 'plan', got {type(data).__name__}")
    for change in changes:
        _change(data, change)
    return parse({"name": path.stem, **data}, str(path))


def parse(data: Mapping[str, Any], source: str) -> Recipe:
    """Return the recipe in plain data; ``source`` names it in errors."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(_explain(e) for e in error.errors()[:3])
        raise RecipeError(f"{source}: {problems}") from error


def write(recipe: Recipe, path: Path) -> None:
    """Write a recipe with every field, so that the run can be repeated whatever the defaults become."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=100)
    path.write_text(text, encoding="utf-8")


def _change(data: dict[str, Any], change: str) -> None:
    """Carry out one KEY=VALUE in place; sections that are not there are opened."""
    key, equals, text = change.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not all((*sections, last)):
        raise RecipeError(f"--set takes KEY=VALUE such as qat.epochs=3, got {change!r}")
    for section in sections:
        if data.get(section) is None:
            data[section] = {}
        data = data[section]
        if not isinstance(data, dict):
            raise RecipeError(f"--set {change}: {section!r} is a value, not a section with keys")
    try:
        data[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {change}: {text!r} is no YAML value: {' '.join(str(error).split())}") from error


def _explain(error: ErrorDetails) -> str:
    """Say where in the file something is wrong, and what would be right."""
    where, name = ".".join(str(part) for part in error["loc"]), str(error["loc"][-1]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        known = _fields(Recipe, error["loc"][:-1])
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        return f"unknown key {where!r}" + (f"; did you mean {close[0]!r}?" if close else f"; known: {known}")
    if error["type"] == "missing":
        return f"the key {where!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] == "value_error" else f", got {error['input']!r:.60}"
    return f"{where + ': ' if where else ''}{message}{given}"


def _fields(section: type[BaseModel], path: Iterable[int | str]) -> list[str]:
    """Return the keys of the mapping at ``path``."""
    for part in (p for p in path if isinstance(p, str)):  # numbers are places in a list of sections
        annotation = section.model_fields[part].annotation
        several = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is list
        options = typing.get_args(annotation) if several else (annotation,)
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(section.model_fields)
