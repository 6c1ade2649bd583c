"""What a sigma search may be told beside its targets; names and defaults follow SigmaQuant (arXiv 2602.22136)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fewbits.allocate.clusters import CLUSTERINGS, NORMS
from fewbits.allocate.divergence import MODES
from fewbits.allocate.two_bit import SCALES
from fewbits.errors import PlanError, nearest

RANKS = ("current", "next")
CHOICES: dict[str, tuple[Any, ...]] = {
    "kl": MODES, "rank": RANKS, "sigma_norm": NORMS, "cluster": CLUSTERINGS, "scale2": (None, *SCALES),
    "size_fit": (True, False), "activations": (None, True, False),
}  # fmt: skip
AT_LEAST = {
    "move": 1, "patience": 1, "rounds": 1, "steps": 0, "evaluate_every": 1, "idle": 1, "epochs_reference": 0,
    "epochs_cluster": 0, "epochs_refine": 0, "penalty": 0, "penalty_step": 0, "seed": 0,
}  # fmt: skip
OF_SEARCH = {  # what only a search that trains and measures heeds
    "size_fit", "rounds", "steps", "move", "patience", "epochs_reference", "epochs_cluster", "epochs_refine",
    "evaluate_every", "idle", "accuracy_buffer", "cost_buffer", "penalty_step", "seed",
}  # fmt: skip
OF_DIVERGENCE = {"kl", "rank", "alpha", "sigma_norm", "cluster", "penalty", "penalty_step", "activations"}
WHOLE = set(AT_LEAST) - {"penalty", "penalty_step"}


@dataclass(frozen=True)
class SearchSettings:
    """kl: divergence that ranks, "plain" or "spread". rank: lowering looks at the score at the "current" bits, or at
    the "next" lower ones. alpha: share of sigma in the score. sigma_norm: "z", "minmax" or "raw". cluster: "dp" (exact)
    or "lloyd". penalty, penalty_step: lambda of unequal clusters at first, and what each further round adds.
    scale2: 2-bit weights are ternary with scale "absmax", "mse" or "learned"; None: as the style has them.
    size_fit: raising skips layers that would break a limit. activations: search widths of inputs too; None: where
    bops are limited.

    rounds: of phase 1. steps: of phase 2, with ``move`` layers each. patience: steps in a row that come no nearer.
    epochs_*: of training, for the INT8 reference, each round and each step; measured every ``evaluate_every`` epochs.
    A step ends earlier at the accuracy asked for, or after ``idle`` measurements without a gain. accuracy_buffer:
    points; cost_buffer: share of the INT8 model's cost. seed: each step seeds the global generators from it. Raises
    PlanError for a value out of range.
    """

    kl: str = "spread"
    rank: str = "current"
    alpha: float = 0.0
    sigma_norm: str = "z"
    cluster: str = "dp"
    penalty: float = 0.0
    penalty_step: float = 0.1
    scale2: str | None = None
    size_fit: bool = True
    activations: bool | None = None
    rounds: int = 2
    steps: int = 40
    move: int = 2
    patience: int = 3
    epochs_reference: int = 4
    epochs_cluster: int = 4
    epochs_refine: int = 40
    evaluate_every: int = 1
    idle: int = 3
    accuracy_buffer: float = 2.0
    cost_buffer: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known or (isinstance(value, int) and not isinstance(value, bool)):
                hint = nearest(str(value), [str(k) for k in known])
                raise PlanError(f"{name} must be one of {known}, got {value!r}{hint}")
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            if not _is_number(value) or not least <= value < math.inf or (name in WHOLE and type(value) is not int):
                kind = "a whole number" if name in WHOLE else "a number"
                raise PlanError(f"{name} must be {kind} from {least}, got {value!r}")
        if not _is_number(self.alpha) or not 0 <= self.alpha <= 1:
            raise PlanError(f"alpha is the share of sigma in the score, from 0 to 1, got {self.alpha!r}")
        for name in ("accuracy_buffer", "cost_buffer"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < math.inf:
                raise PlanError(f"{name} must be a positive number, got {value!r}")

    @staticmethod
    def require_known(names: Iterable[str]) -> None:
        """Raise PlanError, with near names, for one that is no field."""
        known = [f.name for f in dataclasses.fields(SearchSettings)]
        for name in names:
            if name not in known:
                raise PlanError(f"a search has no setting {name!r}{nearest(name, known)}; it takes {known}")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain data."""
        return dataclasses.asdict(self)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
