"""The shape of ``result.json``. Every part may be missing; what is there must have the right type."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Part(BaseModel):
    """One object of the file. Keys that this version does not know are left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)


class Measured(Part):
    """What was measured on one form of the model: float, quantized, packed or in ONNX Runtime.

    Sizes are in bytes, latencies in milliseconds, top-1, top-5 and the agreement in percent.
    """

    metrics: dict[str, Any] = {}
    size_bytes: float | None = None
    weight_bytes: float | None = None
    file_bytes: float | None = None
    avg_weight_bits: float | None = None
    code_mismatches: int | None = None
    max_abs_diff: float | None = None
    mode: str | None = None
    engine: str | None = None
    top1_agreement: float | None = None
    latency_ms: float | None = None
    float_latency_ms: float | None = None

    @field_validator("metrics")
    @classmethod
    def _square_confusion(cls, metrics: dict[str, Any]) -> dict[str, Any]:
        rows = metrics.get("confusion")
        if rows is None:
            return metrics
        if not isinstance(rows, list) or any(not isinstance(r, list) or len(r) != len(rows) for r in rows):
            raise ValueError("'confusion' must be a square matrix: a list of rows, as many as columns")
        if any(not isinstance(n, (int, float)) or not 0 <= n < math.inf for row in rows for n in row):
            raise ValueError("'confusion' must hold counts: finite numbers that are not negative")
        return metrics

    @property
    def bytes(self) -> float | None:
        """Size of the file, or of the model in memory where no file was written."""
        return self.size_bytes if self.file_bytes is None else self.file_bytes

    @property
    def confusion(self) -> list[list[float]]:
        """Counts ``[true class][predicted class]``; empty where they were not measured."""
        return self.metrics.get("confusion") or []

    @property
    def scalars(self) -> dict[str, float]:
        """The metrics that are single numbers, in the order of the file."""
        return {k: float(v) for k, v in self.metrics.items() if type(v) in (int, float)}


class Layer(Part):
    """One quantized layer. ``channel_bits``: how many channels have so many bits, where they differ.
    ``weight_error``: relative MSE of the weight; ``sqnr_db``: of the layer's output.
    """

    name: str
    kind: str = ""
    weight_bits: float | None = None
    channel_bits: dict[str, int] = {}
    input_bits: float | None = None
    granularity: str | None = None
    quantizer: str | None = None
    parameters: float | None = None
    macs: float | None = None
    stored_bytes: float | None = Field(None, alias="bytes")
    weight_error: float | None = None
    sqnr_db: float | None = None


class NotQuantized(Part):
    """One layer that was left in float, and why."""

    name: str
    kind: str = ""
    reason: str = ""


class PlanPart(Part):
    """The layers, and what the plan was decided from."""

    layers: list[Layer] = []
    not_quantized: list[NotQuantized] = []
    decided_from: dict[str, Any] | None = None


class Histogram(Part):
    """Weights of one layer in bins, and the values that the quantizer can represent."""

    edges: list[float]
    counts: list[float]
    grid: list[float] = []

    @model_validator(mode="after")
    def _bins(self) -> Histogram:
        if len(self.counts) < 1 or len(self.edges) != len(self.counts) + 1:
            raise ValueError(f"{len(self.counts)} counts need {len(self.counts) + 1} edges, got {len(self.edges)}")
        if not all(abs(value) < 1e300 for value in (*self.edges, *self.counts, *self.grid)):
            raise ValueError("edges, counts and grid must be finite")
        if sorted(self.edges) != self.edges:
            raise ValueError("edges must ascend")
        return self


class SearchLayer(Part):
    """One layer as a search of bit widths saw it. kl: divergence at each width, by the width as text."""

    name: str
    sigma: float | None = None
    kl: dict[str, float | None] = {}
    cluster: int | None = None


class SearchStep(Part):
    """One configuration that a search tried: bits by layer, what it measured, and what it did next."""

    step: int
    phase: int | str | None = None
    bits: dict[str, float] = {}
    accuracy: float | None = None
    costs: dict[str, float | None] = {}
    region: str = ""
    moved: list[str] = []
    status: str = ""


class SearchReference(Part):
    """What accuracy and costs are compared with."""

    accuracy: float | None = None
    costs: dict[str, float | None] = {}


class Search(Part):
    """A search of bit widths. targets, buffers: "accuracy", and costs by the names of limits; the first cost leads.

    message: the status in words, with what is out of reach.
    """

    status: str = ""
    message: str = ""
    reference: SearchReference = SearchReference()
    targets: dict[str, float | None] = {}
    buffers: dict[str, float | None] = {}
    layers: list[SearchLayer] = []
    log: list[SearchStep] = []


class HardwareLayer(Part):
    """What one layer costs on a hardware: cycles, microjoules and milliseconds for one example."""

    name: str
    cycles: float | None = None
    compute_energy_uj: float | None = None
    memory_energy_uj: float | None = None
    latency_ms: float | None = None


class Hardware(Part):
    """The layers on one hardware description."""

    name: str = ""
    layers: list[HardwareLayer] = []


class FusionNode(Part):
    """One balanced node. log_ratio: of the branches' gradient energies at the end. folded: what took it in."""

    name: str
    branches: list[str] = []
    gains: list[float] = []
    log_ratio: float | None = None
    folded: str = ""


class Fusion(Part):
    """Balanced fusion. forms: metrics of the trained model with the true norm, with constants, and after folding."""

    forms: dict[str, dict[str, Any]] = {}
    nodes: list[FusionNode] = []


class GroupForm(Part):
    """How one form of the model serves each group: accuracies in percent, gaps of rates in 0..1."""

    acc_groups: dict[str, float] = {}
    acc_worst: float | None = None
    acc_group_mean: float | None = None
    acc_gap: float | None = None
    eopp1: float | None = None
    eopp0: float | None = None
    eodd_sum: float | None = None
    eodd_max: float | None = None


class Groups(Part):
    """Groups of the test examples. metric: what their accuracies are, None: top-1. verdict: who lost most, in a
    sentence. beside: the quantized models of other runs on the same examples, by name.
    """

    float_form: GroupForm = Field(GroupForm(), alias="float")
    quantized: GroupForm = GroupForm()
    verdict: str = ""
    metric: str | None = None
    beside: dict[str, GroupForm] = {}


class Tile(Part):
    """One picture as a data URI, and what it shows."""

    caption: str
    image: str = Field(pattern=r"^data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+$")


class LegendEntry(Part):
    """What a colour in the pictures stands for."""

    name: str
    colour: str = Field(pattern=r"^#[0-9a-f]{6}$")


class Pictures(Part):
    """One example: the tiles that stand side by side, and what their colours mean."""

    tiles: list[Tile]
    legend: list[LegendEntry] = []


class Result(Part):
    """The whole file."""

    fewbits: str | None = None
    recipe: str | None = None
    task: str | None = None
    classes: list[str | int | float] | None = None
    seconds: dict[str, float | None] | None = None
    reference: Measured | None = Field(None, alias="float")
    quantized: Measured | None = None
    packed: Measured | None = None
    onnx: Measured | None = None
    size: dict[str, float | None] | None = None
    plan: PlanPart | None = None
    histograms: dict[str, Histogram] | None = None
    pictures: list[Pictures] = []
    budget: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    search: Search | None = None
    hardware: Hardware | None = None
    fusion: Fusion | None = None
    headline: str | None = None
    groups: Groups | None = None

    @property
    def forms(self) -> list[tuple[str, Measured]]:
        """The measured forms of the model that are there, by the names a reader sees."""
        named = {"float": self.reference, "quantized": self.quantized, "packed": self.packed}
        return [(name, form) for name, form in {**named, "ONNX Runtime": self.onnx}.items() if form]

    @property
    def layers(self) -> list[Layer]:
        """The quantized layers in the order of the model."""
        return self.plan.layers if self.plan else []

    def class_name(self, index: int) -> str:
        """Name of a class, or its number where it has no name."""
        names = self.classes or []
        return str(names[index]) if index < len(names) else str(index)
