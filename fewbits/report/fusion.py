"""Balanced fusion in the report: what each node came to, and what folding changed."""

from __future__ import annotations

from fewbits.report.schema import Fusion
from fewbits.report.text import measure, metric, number


def forms(fusion: Fusion, headline: str | None) -> list[tuple[str, str]]:
    """Return the headline metric of each form of the trained model, from the true norm to the folded one."""
    if headline is None:
        return []
    values = {name: metrics.get(headline) for name, metrics in fusion.forms.items()}
    return [(f"{metric(headline).label}, {n}", measure(headline, v)) for n, v in values.items() if v is not None]


def rows(fusion: Fusion) -> list[list[str]]:
    """Return for each node: name, branches with their gains, log ratio, and what took it in."""
    return [
        [
            node.name,
            ", ".join(f"{branch} {number(gain)}" for branch, gain in zip(node.branches, node.gains)),
            number(node.log_ratio),
            node.folded,
        ]
        for node in fusion.nodes
    ]
