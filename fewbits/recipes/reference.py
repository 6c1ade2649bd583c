"""The recipe reference, written from the schema: ``python -m fewbits.recipes.reference > docs/recipes.md``."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fewbits.recipes.schema import Recipe

HEAD = """# Recipe reference

A recipe is a YAML file that `fewbits run RECIPE` takes from a float model to a verified few-bit file and a report.
RECIPE is the name of one that comes with fewbits ({names}) or the path of your own. Any key can be changed for
one run: `fewbits run digits --set plan.weight_bits=3 --set qat.epochs=10`. An unknown key is an error that names the
nearest known one. `--smoke` cuts a recipe down to seconds and, where the data is not there, makes random images or
takes the text that comes with Python.

This file is written from the schema by `python -m fewbits.recipes.reference`.
"""


def reference() -> str:
    """Return the reference as Markdown: one table a section."""
    from fewbits.recipes.read import names

    parts = [HEAD.format(names=", ".join(f"`{n}`" for n in names())), _table("The file", Recipe)]
    for section, keys in _sections(Recipe).items():
        parts.append(_table(" and ".join(f"`{k}`" for k in keys), section))
    return "\n".join(parts)


def _sections(of: type[BaseModel], prefix: str = "") -> dict[type[BaseModel], list[str]]:
    """Return the sections in a section, at any depth, each with the keys that hold one."""
    found: dict[type[BaseModel], list[str]] = {}
    for name, field in of.model_fields.items():
        if (section := _section(field)) is not None:
            found.setdefault(section, []).append(prefix + name)
            found |= _sections(section, f"{prefix}{name}.")
    return found


def _section(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    several = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is list
    options = typing.get_args(annotation) if several else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _table(title: str, section: type[BaseModel]) -> str:
    rows = [f"## {title}", "", section.__doc__ or "", "", "| key | default | meaning |", "| --- | --- | --- |"]
    for name, field in section.model_fields.items():
        rows.append(f"| `{name}` | {_default(field)} | {' '.join((field.description or '').split())} |")
    return "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    value: Any = field.default
    if field.is_required():
        return "required"
    if isinstance(value, BaseModel):
        return "as below"
    return "null" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value or repr(value)}`"


if __name__ == "__main__":
    print(reference(), end="")
