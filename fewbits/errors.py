"""The one family of errors.

Every message names what was given (value, shape, layer or file), what was expected, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class FewbitsError(Exception):
    """Base of every error that fewbits raises on purpose."""


class PlanError(FewbitsError):
    """A plan that is malformed, or that does not fit the model."""


class QuantizationError(FewbitsError):
    """A tensor or a layer that cannot be quantized as asked."""


class BudgetError(FewbitsError):
    """A budget that no plan can meet."""


class HardwareError(FewbitsError):
    """A hardware description that is malformed, or that cannot run what a plan asks of it."""


class SearchError(FewbitsError):
    """A search that cannot go on: what trains or measures the model failed. ``log``: its steps so far."""

    log: tuple[dict[str, Any], ...] = ()


class DataError(FewbitsError):
    """Input data that is missing, empty or out of range."""


class TrainingError(FewbitsError):
    """A training run that cannot start as asked, or that cannot go on."""


class PackedFileError(FewbitsError):
    """A packed file that is damaged, of another version, or of another architecture."""


class CheckpointError(FewbitsError):
    """A checkpoint that cannot be written or read back."""


class ExportError(FewbitsError):
    """A model that cannot be exported, or an exported file that does not verify."""


class FairnessError(FewbitsError):
    """A group lost more than was allowed."""


class RecipeError(FewbitsError):
    """A recipe that is malformed, or that asks for something unknown."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return a hint such as ``"; did you mean 'conv1'?"``, or an empty string where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
