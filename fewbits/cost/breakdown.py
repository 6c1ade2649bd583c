"""What a plan costs on hardware, layer by layer, and against INT8 on the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fewbits.cost.engines import MacArray
from fewbits.cost.hardware import Hardware, layer_energies, layer_latency
from fewbits.cost.shapes import LayerShape, ModelShape
from fewbits.cost.work import layer_work
from fewbits.errors import HardwareError
from fewbits.plan import LayerPlan, Plan


@dataclass(frozen=True)
class LayerCost:
    """One layer for the example. cycles: of one MAC that does all the work; None on a roofline. Energies in
    microjoules, latency in milliseconds. bound: "compute" or "memory", whichever takes longer.
    int8_energy, int8_latency: of its products on INT8 MACs.
    """

    name: str
    macs: int
    cycles: float | None
    compute_energy: float
    memory_energy: float
    latency: float
    compute_latency: float
    bound: str
    int8_energy: float
    int8_latency: float


@dataclass(frozen=True)
class HardwareCost:
    """All layers, one after the other. mac_area: of one MAC in square micrometres, or None; area_ratio: against the
    INT8 MAC's.
    """

    layers: tuple[LayerCost, ...]
    mac_area: float | None = None
    area_ratio: float | None = None

    @property
    def cycles(self) -> float | None:
        """Cycles of one MAC that does all the work; None on a roofline."""
        counts = [row.cycles for row in self.layers if row.cycles is not None]
        return sum(counts) if len(counts) == len(self.layers) else None

    @property
    def compute_energy(self) -> float:
        """Microjoules of all products."""
        return sum(row.compute_energy for row in self.layers)

    @property
    def memory_energy(self) -> float:
        """Microjoules of all reads."""
        return sum(row.memory_energy for row in self.layers)

    @property
    def latency(self) -> float:
        """Milliseconds."""
        return sum(row.latency for row in self.layers)

    @property
    def energy_ratio(self) -> float:
        """Compute energy against that of INT8 on the same hardware; no memory in either."""
        return self.compute_energy / sum(row.int8_energy for row in self.layers)

    @property
    def latency_ratio(self) -> float:
        """Time to compute against that of INT8 on the same hardware; no memory in either."""
        return sum(row.compute_latency for row in self.layers) / sum(row.int8_latency for row in self.layers)


def hardware_cost(
    plan: Plan, shape: ModelShape, hardware: Hardware, cycles: Mapping[str, float] | None = None
) -> HardwareCost:
    """Return what a plan costs on hardware for the example that the shape was taken with.

    cycles: {layer: mean cycles of a product}, as of ``plan_cycles``, needed where ``hardware.measures_cycles``.
    Raises HardwareError if the shape was taken without an example or for what the hardware cannot run.
    """
    if not any(layer.macs + layer.operand_macs for layer in shape.layers):
        raise HardwareError("energy and latency need MACs: take the shape with an example, model_shape(model, example)")
    decided, cycles = shape.resolve(plan), cycles or {}
    rows = tuple(_row(layer, decided.get(layer.name), hardware, cycles.get(layer.name)) for layer in shape.layers)
    engine = hardware.engine
    if isinstance(engine, MacArray):
        return HardwareCost(rows, engine.mac_area, engine.area_ratio)
    return HardwareCost(rows)


def _row(layer: LayerShape, plan: LayerPlan | None, hardware: Hardware, cycles: float | None) -> LayerCost:
    work, engine = layer_work(layer, plan), hardware.engine
    energy = layer_energies(layer, plan, hardware, cycles)
    latency = layer_latency(layer, plan, hardware, cycles)
    computing = 1e3 * engine.seconds(work, cycles)
    picojoules, seconds = engine.reference(layer_work(layer, plan, dense=True))
    return LayerCost(
        name=layer.name,
        macs=work.all_macs,
        cycles=engine.cycles(work, cycles),
        compute_energy=energy.compute,
        memory_energy=energy.memory,
        latency=latency,
        compute_latency=computing,
        bound="compute" if computing >= latency else "memory",
        int8_energy=picojoules / 1e6,
        int8_latency=1e3 * seconds,
    )
