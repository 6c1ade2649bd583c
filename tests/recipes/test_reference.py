from __future__ import annotations

from pathlib import Path

from fewbits.recipes.reference import reference
from fewbits.recipes.schema import Recipe, Training


def test_the_reference_in_the_docs_is_that_of_the_schema() -> None:
    docs = Path(__file__).parents[2] / "docs" / "recipes.md"
    assert docs.read_text(encoding="utf-8") == reference(), "run: python -m fewbits.recipes.reference > docs/recipes.md"


def test_every_key_is_explained() -> None:
    for section in (Recipe, Training):
        assert all(field.description for field in section.model_fields.values())
    assert "| `accumulate` | `1` | Batches an update. |" in reference()
