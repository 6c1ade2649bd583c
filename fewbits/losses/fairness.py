"""Fairness terms: what the worst-served group of a batch loses (after FairQuant, arXiv 2602.23192)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import TrainingError

MODES = ("gap", "gap_sg", "worst", "dro")


class GroupFairness:
    """weight * F of the group means of a batch's losses, CE_g; groups below ``least`` examples in it are left out.

    mode: "gap": max CE_g - min CE_g, as the method's release has it; "gap_sg" (ours): the same value, but no gradient
    through the minimum, so that it never pays to serve the best group worse; "worst": max CE_g; "dro": sum of q_g CE_g
    with q_g <- q_g exp(rate CE_g), normalised, over all batches (Sagawa et al. 2020, "Distributionally robust neural
    networks", algorithm 1). weight: lambda_f, times ``ramp``, which a trainer may raise from 0 to 1 (``FairnessRamp``).
    groups: their names. shares: of the training examples; with them, "gap" warns where its weight outweighs a group's
    own share: its loss then falls as that group is served worse. Raises TrainingError for a value out of range, and
    warns where there are fewer than two groups: the term is then zero.
    """

    def __init__(
        self,
        groups: Sequence[str],
        mode: str = "gap_sg",
        weight: float = 0.5,
        *,
        least: int = 8,
        rate: float = 0.01,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        if mode not in MODES:
            raise TrainingError(f"a fairness term must be one of {MODES}, got {mode!r}")
        if not 0 < weight < float("inf") or not 0 < rate < float("inf") or least < 1:
            raise TrainingError(
                f"a fairness term needs weight and rate above 0 and least of at least 1, got weight={weight}, "
                f"rate={rate}, least={least}"
            )
        self.groups, self.mode, self.weight, self.least, self.rate = tuple(groups), mode, weight, least, rate
        self.ramp = 1.0
        self.shares_of_worst = torch.full((len(self.groups),), 1 / max(len(self.groups), 1))  # q of "dro"
        if len(self.groups) < 2:
            warnings.warn(f"fairness terms are inactive: there is one group, {list(self.groups)}", stacklevel=2)
        outweighed = {group: share for group, share in (shares or {}).items() if share < weight}
        if mode == "gap" and outweighed:
            named = ", ".join(f"{group} ({share:.2f})" for group, share in outweighed.items())
            warnings.warn(
                f"with weight {weight:g} the gap rewards serving these groups worse, as their share of the examples is "
                f"below it: {named}; use mode 'gap_sg', or a weight below {min(outweighed.values()):g}",
                stacklevel=2,
            )

    def __call__(self, losses: Tensor, groups: Tensor) -> Tensor:
        """Return the weighted term, a scalar. losses: of the examples, [B]; groups: int64 [B], negative: unknown.

        Zero where fewer than two groups have ``least`` examples.
        """
        means, there = group_means(losses, groups, len(self.groups), self.least)
        if len(there) < 2:
            return losses.sum() * 0.0
        return self.weight * self.ramp * self._term(means, there)

    def _term(self, means: Tensor, there: Tensor) -> Tensor:
        if self.mode == "gap":
            return means.max() - means.min()
        if self.mode == "gap_sg":
            return means.max() - means.min().detach()
        if self.mode == "worst":
            return means.max()
        q = self.shares_of_worst = self.shares_of_worst.to(means.device)
        q[there] *= (self.rate * means.detach()).exp()
        q /= q.sum()
        return (q[there] / q[there].sum() * means).sum()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        return {"shares_of_worst": self.shares_of_worst.cpu().tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo ``state_dict``."""
        self.shares_of_worst = torch.tensor(state["shares_of_worst"])


def group_means(losses: Tensor, groups: Tensor, count: int, least: int = 1) -> tuple[Tensor, Tensor]:
    """Return (mean loss, index) of each group with ``least`` examples in the batch. losses [B], groups int64 [B]."""
    if losses.shape != groups.shape or losses.ndim != 1:
        raise TrainingError(f"losses {list(losses.shape)} and groups {list(groups.shape)} must both be [batch]")
    known = groups >= 0
    index = groups[known]
    sums = losses.new_zeros(count).index_add(0, index, losses[known])
    sizes = torch.bincount(index, minlength=count)
    there = (sizes >= least).nonzero().flatten()
    return sums[there] / sizes[there], there
