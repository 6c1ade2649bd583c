"""What one more bit of a layer's weights costs on hardware: for widths that are trained to an energy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from fewbits.cost.breakdown import hardware_cost
from fewbits.cost.cycles import plan_cycles
from fewbits.cost.hardware import Hardware
from fewbits.cost.shapes import ModelShape
from fewbits.errors import HardwareError
from fewbits.plan import LayerPlan, Plan


@dataclass(frozen=True)
class BitPrices:
    """Energy as a line in the widths: ``fixed`` plus for each layer its price times the mean bits of its channels.

    prices: {layer: microjoules a bit}; fixed: microjoules of everything else.
    """

    prices: Mapping[str, float]
    fixed: float

    def mean_bits(self, energy_uj: float) -> float:
        """Return the mean width, by price, at which the whole takes ``energy_uj`` microjoules."""
        return (energy_uj - self.fixed) / sum(self.prices.values())

    def energy(self, bits: Mapping[str, float]) -> float:
        """Return the microjoules of mean widths {layer: bits}."""
        return self.fixed + sum(price * bits[name] for name, price in self.prices.items())


def bit_prices(
    model: nn.Module,
    plan: Plan,
    shape: ModelShape,
    hardware: Hardware,
    layers: Iterable[str],
    lowest: int = 2,
    highest: int = 8,
) -> BitPrices:
    """Return what the bits of these layers' weights cost: the chord between all at ``lowest`` and all at ``highest``.

    model: with the weights by which cycles are counted, where the hardware does so. The rest of the plan stays as it
    is. Raises HardwareError where the energy does not depend on these widths.
    """
    names = tuple(layers)
    at = {bits: _energies(model, _with_bits(plan, shape, names, bits), shape, hardware) for bits in (lowest, highest)}
    prices = {name: (at[highest][name] - at[lowest][name]) / (highest - lowest) for name in names}
    if min(prices.values(), default=0.0) < 0 or sum(prices.values()) <= 0:
        raise HardwareError(
            f"on {hardware.name!r} the energy does not grow with the bits of a weight, so widths cannot be learned to "
            "it: take average_bits, or hardware whose energy depends on them, such as shift_add"
        )
    fixed = sum(at[lowest].values()) - lowest * sum(prices.values())
    return BitPrices(prices, fixed)


def _with_bits(plan: Plan, shape: ModelShape, names: tuple[str, ...], bits: int) -> Plan:
    """Return the plan of every layer, ``names`` with this width and the quantizer that they settle to."""
    rules: list[tuple[str, LayerPlan | None]] = []
    for name, layer in shape.resolve(plan).items():
        if name in names and layer is not None and layer.weight is not None:
            weight = dataclasses.replace(layer.weight, bits=bits, quantizer="maxabs", options={}, channel_bits=None)
            layer = dataclasses.replace(layer, weight=weight)
        rules.append((name, layer))
    return Plan(tuple(rules))


def _energies(model: nn.Module, plan: Plan, shape: ModelShape, hardware: Hardware) -> dict[str, float]:
    cycles = plan_cycles(model, plan) if hardware.measures_cycles else None
    rows = hardware_cost(plan, shape, hardware, cycles).layers
    return {row.name: row.compute_energy + row.memory_energy for row in rows}
