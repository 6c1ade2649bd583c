"""The plan: which layer is quantized how, as data.

A plan is an ordered list of rules ``(pattern, LayerPlan | None)``. A pattern is an exact module name or a
glob (``layer1.*``); the **last** rule that matches a layer decides, so general rules come first and exceptions
after. ``None`` leaves the layer in float. Plans are frozen, versioned and JSON.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fewbits.errors import PlanError, nearest

PLAN_VERSION = 1
WEIGHT_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
ACTIVATION_BITS = (*WEIGHT_BITS, 16)
GRANULARITIES = ("tensor", "channel", "block", "head")
RANGES = ("minmax", "percentile", "mse")


@dataclass(frozen=True)
class Sparsity:
    """An N:M pattern: of every ``of`` (M) consecutive weights along the contraction axis, ``kept`` (N) are not zero."""

    kept: int
    of: int

    @staticmethod
    def parse(text: str) -> Sparsity:
        """Read "2:4". Raises PlanError unless it is N:M with 1 <= N < M <= 256."""
        found = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", text) if isinstance(text, str) else None
        kept, of = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= kept < of <= 256:
            raise PlanError(
                f"sparsity must be a text N:M with 1 <= N < M <= 256, such as '2:4' (2 of every 4 weights are kept), "
                f"got {text!r}"
            )
        return Sparsity(kept, of)

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"

    @property
    def position_bits(self) -> int:
        """Bits that name one of the M positions."""
        return (self.of - 1).bit_length()

    def count(self, numel: int) -> int:
        """Return how many of ``numel`` weights are kept."""
        return numel * self.kept // self.of


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor is quantized.

    bits: width of a code, 1..8 (16 for activations). quantizer: a registered name. symmetric: no zero point.
    granularity: what shares a scale. block: elements of a block along the contraction axis. range: how calibration
    finds the initial range; dynamic quantizers are not calibrated, and have an option of their own. sparsity: "N:M",
    of weights only. channel_bits: the width of each channel, for granularity "channel"; ``bits`` is then the widest.
    options: further keyword arguments of the quantizer.
    """

    bits: int
    quantizer: str = "lsq"
    symmetric: bool = True
    granularity: str = "tensor"
    block: int | None = None
    range: str = "mse"
    sparsity: str | None = None
    channel_bits: tuple[int, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in ACTIVATION_BITS:
            raise PlanError(f"bits must be one of {ACTIVATION_BITS}, got {self.bits!r}")
        if self.granularity not in GRANULARITIES:
            raise PlanError(f"granularity must be one of {GRANULARITIES}, got {self.granularity!r}")
        if type(self.symmetric) is not bool:
            raise PlanError(f"symmetric must be True or False, got {self.symmetric!r}")
        if self.range not in RANGES:
            raise PlanError(f"range must be one of {RANGES}, got {self.range!r}")
        if (self.granularity == "block") != (self.block is not None):
            raise PlanError(f"block={self.block!r} with granularity={self.granularity!r}: give both or neither")
        if self.block is not None and (type(self.block) is not int or self.block < 1):
            raise PlanError(f"block must be a whole number from 1, got {self.block!r}")
        if self.pattern is not None and not self.symmetric:
            raise PlanError(
                f"sparsity={self.sparsity!r} with symmetric=False: a zero point or an offset would make pruned weights "
                "other than zero; use symmetric=True"
            )
        if self.channel_bits is not None:
            self._check_channels()
        if not isinstance(self.options, Mapping):
            raise PlanError(f"options must be a mapping of keyword arguments, got {self.options!r}")
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def _check_channels(self) -> None:
        widths = self.channel_bits
        if not isinstance(widths, (list, tuple)) or not widths or any(b not in WEIGHT_BITS[1:] for b in widths):
            raise PlanError(f"channel_bits holds a width of {WEIGHT_BITS[1:]} for each channel, got {widths!r}")
        if max(widths) != self.bits:
            raise PlanError(f"bits={self.bits} with channel_bits up to {max(widths)}: bits is the widest of them")
        if self.granularity != "channel" or not self.symmetric or self.sparsity is not None:
            raise PlanError(
                "channel_bits needs granularity='channel', symmetric=True and no sparsity, got "
                f"granularity={self.granularity!r}, symmetric={self.symmetric}, sparsity={self.sparsity!r}"
            )
        object.__setattr__(self, "channel_bits", tuple(widths))

    @property
    def mean_bits(self) -> float:
        """Bits of a code, the mean over channels where they differ."""
        return self.bits if self.channel_bits is None else sum(self.channel_bits) / len(self.channel_bits)

    @property
    def pattern(self) -> Sparsity | None:
        """The N:M pattern, or None where dense."""
        return None if self.sparsity is None else Sparsity.parse(self.sparsity)

    def __reduce__(self) -> tuple[Any, ...]:
        return tensor_plan, (self.to_dict(),)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, and always ``bits``."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        given["options"] = dict(self.options)
        defaults = {f.name: f.default for f in dataclasses.fields(self)} | {"options": {}}
        return {k: v for k, v in given.items() if k == "bits" or v != defaults[k]}


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is quantized: its weight, what feeds it, what it returns, and an attention's matmul operands.

    A field that is ``None`` stays in float. ``output`` serves where a result meets another branch before the next
    quantizer, as at the end of a residual block: integer engines can then run the layer without going to float.
    """

    weight: TensorPlan | None = None
    input: TensorPlan | None = None
    operands: TensorPlan | None = None
    output: TensorPlan | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and self.weight.bits not in WEIGHT_BITS:
            raise PlanError(f"weight bits must be one of {WEIGHT_BITS}, got {self.weight.bits}")
        for name in ("input", "operands", "output"):
            if (given := getattr(self, name)) is not None and given.sparsity is not None:
                raise PlanError(f"sparsity={given.sparsity!r} of {name}: only weights can be sparse, drop it there")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are quantized, as plain data."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: tensor.to_dict() for name, tensor in fields.items() if tensor is not None}


Rule = tuple[str, "LayerPlan | None"]


@dataclass(frozen=True)
class Plan:
    """An ordered list of rules, and what they were decided from (method, budget, metrics)."""

    rules: tuple[Rule, ...]
    decided_from: Mapping[str, Any] = field(default_factory=dict, hash=False)
    version: int = PLAN_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple((str(p), layer) for p, layer in self.rules))
        for pattern, layer in self.rules:
            if layer is not None and not isinstance(layer, LayerPlan):
                raise PlanError(f"the rule for {pattern!r} must be a LayerPlan, or None for float, got {layer!r}")
        object.__setattr__(self, "decided_from", MappingProxyType(dict(self.decided_from)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan.from_dict, (self.to_dict(),)

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def override(self, *rules: Rule) -> Plan:
        """Return a plan with more rules behind the present ones; they win where both match."""
        return dataclasses.replace(self, rules=(*self.rules, *rules))

    def resolve(
        self,
        layers: Iterable[str],
        exact: Iterable[str] = (),
        narrow: Callable[[str, LayerPlan], LayerPlan] | None = None,
    ) -> dict[str, LayerPlan | None]:
        """Match the rules against the names of quantizable ``layers``; return the decision for those named.

        exact: further names that only a rule with the very name reaches, no glob. narrow: reduces what a glob asks of a
        layer to what that layer has; a rule with the exact name is taken at its word. Raises PlanError for a rule that
        matches nothing, with near names.
        """
        names, exact = list(layers), set(exact)
        decided: dict[str, LayerPlan | None] = {}
        for pattern, layer in self.rules:
            by_name = pattern in exact or pattern in names
            hits = [pattern] if by_name else [n for n in names if fnmatch.fnmatchcase(n, pattern)]
            if not hits:
                hint = nearest(pattern, names) or f"; the quantizable layers are {names[:8]}"
                raise PlanError(f"plan pattern {pattern!r} matches no quantizable layer{hint}")
            for name in hits:
                decided[name] = layer if layer is None or narrow is None or name == pattern else narrow(name, layer)
        return {name: decided[name] for name in (*names, *sorted(exact)) if name in decided}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``from_dict`` reads back to an equal plan."""
        rules = [[p, None if layer is None else layer.to_dict()] for p, layer in self.rules]
        return {"version": self.version, "rules": rules, "decided_from": dict(self.decided_from)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Plan:
        """Read what ``to_dict`` wrote. Raises PlanError for another version or unknown keys."""
        if not isinstance(data, Mapping) or data.get("version") != PLAN_VERSION:
            found = data.get("version") if isinstance(data, Mapping) else type(data).__name__
            raise PlanError(f"plan version {found!r} is not {PLAN_VERSION}; write it again with this fewbits")
        _check_keys(data, ("version", "rules", "decided_from"), "plan")
        given, decided_from = data.get("rules", ()), data.get("decided_from", {})
        if not isinstance(given, (list, tuple)) or not isinstance(decided_from, Mapping):
            raise PlanError(f"a plan has a list 'rules' and a mapping 'decided_from', got {given!r}, {decided_from!r}")
        rules = []
        for rule in given:
            if not isinstance(rule, (list, tuple)) or len(rule) != 2:
                raise PlanError(f"a rule is a pair [pattern, layer or null], got {rule!r}")
            rules.append((rule[0], None if rule[1] is None else layer_plan(rule[1])))
        return Plan(tuple(rules), decided_from)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan from JSON. Raises PlanError, naming the file, where it is not one."""
        try:
            return Plan.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise PlanError(f"cannot read the plan {str(path)!r}: {error}") from error
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


def _check_keys(data: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    known = tuple(known)
    if not isinstance(data, Mapping):
        raise PlanError(f"a {what} is a mapping with keys of {known}, got {data!r}")
    for key in data:
        if key not in known:
            raise PlanError(f"unknown key {key!r} in a {what}{nearest(key, known)}; known: {known}")


def tensor_plan(data: Mapping[str, Any]) -> TensorPlan:
    """Read what ``TensorPlan.to_dict`` wrote. Raises PlanError for unknown keys."""
    _check_keys(data, (f.name for f in dataclasses.fields(TensorPlan)), "tensor plan")
    if "bits" not in data:
        raise PlanError(f"a tensor plan needs 'bits', got only {sorted(data)}")
    return TensorPlan(**data)


def layer_plan(data: Mapping[str, Any]) -> LayerPlan:
    """Read what ``LayerPlan.to_dict`` wrote. Raises PlanError for unknown keys."""
    _check_keys(data, (f.name for f in dataclasses.fields(LayerPlan)), "layer plan")
    return LayerPlan(**{k: None if v is None else tensor_plan(v) for k, v in data.items()})
