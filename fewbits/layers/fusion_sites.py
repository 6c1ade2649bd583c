"""Where branches meet: the cats and adds of a model's forward, and which of them fuse different depths or scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fewbits.layers.record import GATES, Entry, Record, record

WEIGHTED = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")
SPATIAL = ("conv", "pool", "interpolate", "upsample", "pixel_", "grid_sample")  # parts of names that change a scale
POOLED = ("adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "amax")  # to one place: context, and no scale


@dataclass(frozen=True)
class FusionSite:
    """A cat or add in some module's forward.

    owner: name of the module whose forward calls it. op: "cat" or "add". nth: which call of that op there, from 0.
    axis: of the channels. branches: a name for each. fuses: whether its branches come from different scales. output:
    its entry in the record.
    """

    owner: str
    op: str
    nth: int
    axis: int
    branches: tuple[str, ...]
    fuses: bool
    output: int

    @property
    def key(self) -> str:
        """The name inside the owner, such as ``cat0``."""
        return f"{self.op}{self.nth}"

    @property
    def name(self) -> str:
        """The name inside the model, such as ``neck.up1.cat0``."""
        return f"{self.owner}.{self.key}" if self.owner else self.key


def find_sites(model: nn.Module, example: Any) -> list[FusionSite]:
    """Return every cat and add of a forward that a fusion node can take over, in the order in which they run.

    example: a batch, as for ``calibrate``. ``fuses`` follows a rule on scales: going back from each branch to what the
    branches have in common, they pass different resolutions, as an upsampled tensor and a skip do, or the two inputs
    of each node of a PAN or an FPN. Not so the branches of a residual, CSP, Inception or SPP block, nor a sum inside
    an attention gate. Behind it there is a layer with a weight; a sum of logits has none.
    """
    return sites_in(record(model, example))


def sites_in(seen: Record) -> list[FusionSite]:
    """Return the sites of a record; of a module that runs several times, those of the first time."""
    found: dict[tuple[str, str, int], FusionSite] = {}
    for index, entry in enumerate(seen.entries):
        if entry.fits:
            kind = "cat" if entry.op.startswith("conc") or entry.op == "cat" else "add"
            fuses = _scales_differ(seen, entry) and _feeds_a_layer(seen, index) and not _is_gate(seen, index)
            site = FusionSite(entry.owners[-1], kind, entry.nth, entry.axis, _names(seen, entry), fuses, index)
            found.setdefault((site.owner, kind, entry.nth), site)
    return list(found.values())


def _scales_differ(seen: Record, site: Entry) -> bool:
    branches = [seen.entries[b] for b in site.branches]
    if any(len(b.shape) not in (4, 5) for b in branches) or site.axis != 1:
        return False
    if not all(_is_feature(seen, b) for b in branches):
        return False
    common = branches[0].origins
    for branch in branches:
        common &= branch.origins
    passed = [_scales(seen, branch, common) for branch in branches]
    return any(p != passed[0] for p in passed)


def _is_feature(seen: Record, branch: Entry) -> bool:
    """Tell whether a tensor comes from a layer or the model's input, and not from parameters alone."""
    return any(
        (e.op in WEIGHTED or (e.op == "input" and len(e.shape) == len(branch.shape))) and branch.origins >> i & 1
        for i, e in enumerate(seen.entries)
    )


def _scales(seen: Record, branch: Entry, common: int) -> set[tuple[int, ...]]:
    """Return the resolutions that only this branch passes, by what spatial functions take and give, and its own."""
    own = [e for i, e in enumerate(seen.entries) if (branch.origins & ~common) >> i & 1]
    spatial = [e for e in own if any(part in e.op for part in SPATIAL)]
    shapes = [shape for e in spatial for shape in (e.shape, *(seen.entries[p].shape for p in e.parents[:1]))]
    scales = {shape[2:] for shape in (*shapes, branch.shape) if len(shape) == len(branch.shape)}
    if any(e.op in POOLED for e in own):
        scales -= {s for s in scales if set(s) == {1}}
    return scales


def _feeds_a_layer(seen: Record, index: int) -> bool:
    return any(e.op in WEIGHTED and e.origins >> index & 1 for e in seen.entries[index + 1 :])


def _is_gate(seen: Record, index: int) -> bool:
    """Tell whether an entry reaches what the model returns only by way of a gate that something is multiplied by."""
    with_gates, without = {index}, {index}
    for i, entry in enumerate(seen.entries[index + 1 :], start=index + 1):
        if with_gates.intersection(entry.parents):
            with_gates.add(i)
        if any(p in without and not (entry.op == "mul" and seen.entries[p].op in GATES) for p in entry.parents):
            without.add(i)
    return not with_gates.isdisjoint(seen.returned) and without.isdisjoint(seen.returned)


def _names(seen: Record, site: Entry) -> tuple[str, ...]:
    """Return "deep" and "shallow" for two branches with more and fewer weighted layers behind them, else numbers."""
    counts = [
        sum(e.op in WEIGHTED and bool(seen.entries[b].origins >> i & 1) for i, e in enumerate(seen.entries))
        for b in site.branches
    ]
    if len(counts) == 2 and counts[0] != counts[1]:
        return ("deep", "shallow") if counts[0] > counts[1] else ("shallow", "deep")
    return tuple(f"branch{i}" for i in range(len(counts)))
