"""Engines: what multiplies. Each knows the cycles, the energy and the time of a layer's work, nothing of memory.

Where numbers come from is said in the ready descriptions (``*.yaml`` beside this file) and in docs/hardware.md.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fewbits.cost.work import Work
from fewbits.errors import HardwareError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
BYTE = 8


class Section(BaseModel):
    """One mapping of a description. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class MacArray(Section):
    """``count`` equal MACs that read 8-bit activations.

    An input or operand that the plan leaves in float is fed as 8 bits, as there is no other way in; one of 16 bits
    takes two passes. Float weights take a float unit, one MAC a cycle.
    """

    count: Annotated[int, Field(ge=1)]
    """MACs that work at once."""
    clock_mhz: Positive
    """Clock of the array."""
    int8_pj: Positive
    """Energy of one 8 x 8 bit MAC of the parallel kind, in pJ: the reference of ratios."""
    float_pj: Positive
    """Energy of one float MAC, in pJ."""
    int8_area_um2: Positive
    """Area of one MAC of the parallel kind, in square micrometres."""

    @property
    def mac_area(self) -> float:
        """Area of one MAC in square micrometres."""
        return self.int8_area_um2

    @property
    def area_ratio(self) -> float:
        """Area of one MAC against that of the parallel INT8 one."""
        return self.mac_area / self.int8_area_um2

    def cycles(self, work: Work, mean: float | None) -> float:
        """Return the cycles of one MAC that does all the work. mean: cycles of a product, where they are measured."""
        product = 1.0 if work.weight_bits > BYTE else self.product_cycles(work, mean)
        return work.macs * passes(work.input_bits) * product + work.operand_macs * passes(
            work.operand_bits
        ) * self.operand_cycles(work)

    def picojoules(self, work: Work, mean: float | None) -> float:
        """Return the energy of the products."""
        product = self.float_pj if work.weight_bits > BYTE else self.product_pj(work, mean)
        return work.macs * passes(work.input_bits) * product + work.operand_macs * passes(
            work.operand_bits
        ) * self.operand_pj(work)

    def seconds(self, work: Work, mean: float | None) -> float:
        """Return the time, all MACs busy in every cycle."""
        return self.cycles(work, mean) / (self.count * self.clock_mhz * 1e6)

    def reference(self, work: Work) -> tuple[float, float]:
        """Return (pJ, seconds) of the same layer, dense, on parallel INT8 MACs: one cycle each."""
        return work.all_macs * self.int8_pj, work.all_macs / (self.count * self.clock_mhz * 1e6)

    def product_cycles(self, work: Work, mean: float | None) -> float:
        """Return the mean cycles of one product with a weight of at most 8 bits."""
        return 1.0

    def product_pj(self, work: Work, mean: float | None) -> float:
        """Return the mean energy of one product with a weight of at most 8 bits."""
        return self.int8_pj

    def operand_cycles(self, work: Work) -> float:
        """Return the cycles of one product of two activations."""
        return 1.0

    def operand_pj(self, work: Work) -> float:
        """Return the energy of one product of two activations."""
        return self.int8_pj


class Int8Mac(MacArray):
    """The parallel INT8 MAC: one cycle and one energy, whatever the bits of the weight."""

    kind: Literal["int8_mac"]


class ShiftAddMac(MacArray):
    """The serial shift-add MAC (SigmaQuant, arXiv 2602.22136): one cycle a set bit of the weight, at least one.

    ``measured`` takes the mean cycles from the codes of each layer (fewbits.cost.weight_cycles); energy is then
    base_pj + cycle_pj * cycles. ``linear`` takes cycles_per_bit * bits, at least one, and base_pj + bit_pj * bits.
    """

    kind: Literal["shift_add"]
    cycles_from: Literal["measured", "linear"]
    """Where the cycles of a weight come from."""
    area_um2: Positive
    """Area of one MAC, in square micrometres."""
    base_pj: NotNegative
    """Energy of a product beside that of its cycles, in pJ."""
    cycle_pj: NotNegative
    """Energy of one cycle, in pJ (measured)."""
    bit_pj: NotNegative
    """Energy of one bit of the weight, in pJ (linear)."""
    cycles_per_bit: Positive
    """Cycles of one bit of the weight (linear, and products of two activations)."""

    @property
    def mac_area(self) -> float:
        """Area of one MAC in square micrometres."""
        return self.area_um2

    def product_cycles(self, work: Work, mean: float | None) -> float:
        """Return the mean cycles of one product. Raises HardwareError where they are to be measured, and are not."""
        if self.cycles_from == "linear":
            return self.linear_cycles(work.mean_bits)
        if mean is None and work.macs:
            raise HardwareError(
                f"layer {work.name!r}: cycles_from 'measured' needs the mean cycles of its weight: pass those of "
                "fewbits.cost.weight_cycles or plan_cycles, or take a description with cycles_from: linear"
            )
        return 1.0 if mean is None else mean

    def product_pj(self, work: Work, mean: float | None) -> float:
        """Return the mean energy of one product."""
        if self.cycles_from == "linear":
            return self.base_pj + self.bit_pj * work.mean_bits
        return self.base_pj + self.cycle_pj * self.product_cycles(work, mean)

    def linear_cycles(self, bits: float) -> float:
        """Return cycles_per_bit * bits, at least one."""
        return max(1.0, self.cycles_per_bit * bits)

    def operand_cycles(self, work: Work) -> float:
        """Return the cycles of one product of two activations, the second of which is fed like a weight: by bits."""
        return self.linear_cycles(min(work.operand_bits, BYTE))

    def operand_pj(self, work: Work) -> float:
        """Return the energy of one product of two activations."""
        return self.base_pj + self.bit_pj * min(work.operand_bits, BYTE)


class Roofline(Section):
    """Peak rates by bit width (Williams et al. 2009, "Roofline"). A product runs at the wider width of its two sides,
    or at the next one listed: weights of 4 bits with float inputs run as float.
    """

    kind: Literal["roofline"]
    gmacs_per_s: dict[int, Positive]
    """Billions of MACs a second, by bit width; 32 is float."""
    pj_per_mac: dict[int, Positive]
    """Energy of one MAC in pJ, for the same widths."""

    @model_validator(mode="after")
    def _same_widths(self) -> Roofline:
        widths = set(self.gmacs_per_s)
        if not widths or widths != set(self.pj_per_mac) or max(widths) < BYTE or min(widths) < 1:
            raise ValueError(
                f"gmacs_per_s {sorted(widths)} and pj_per_mac {sorted(self.pj_per_mac)} must list the same bit widths, "
                "from 1 up, one of them 8 or more"
            )
        return self

    def cycles(self, work: Work, mean: float | None) -> None:
        """A roofline knows of no cycles."""

    def picojoules(self, work: Work, mean: float | None) -> float:
        """Return the energy of the products."""
        return sum(macs * self.pj_per_mac[self.width(work.name, bits)] for macs, bits in _by_bits(work))

    def seconds(self, work: Work, mean: float | None) -> float:
        """Return the time at peak rate."""
        return sum(macs / self.gmacs_per_s[self.width(work.name, bits)] for macs, bits in _by_bits(work)) / 1e9

    def reference(self, work: Work) -> tuple[float, float]:
        """Return (pJ, seconds) of the same layer with 8 bits for everything."""
        return self.picojoules(work.at_int8(), None), self.seconds(work.at_int8(), None)

    def width(self, layer: str, bits: int) -> int:
        """Return the listed width that runs products of ``bits``. Raises HardwareError if there is none."""
        wide = [width for width in self.gmacs_per_s if width >= bits]
        if not wide:
            what = "float" if bits == 32 else f"{bits} bits"
            raise HardwareError(
                f"layer {layer!r} needs products of {what}, this hardware runs {sorted(self.gmacs_per_s)} bits: give "
                "its weight and its input fewer bits (--act-bits 8), or add the width to the description"
            )
        return min(wide)


def passes(bits: int) -> int:
    """Return how often an 8-bit input port takes an activation: float ones are fed as 8 bits."""
    return 2 if bits == 2 * BYTE else 1


def _by_bits(work: Work) -> list[tuple[int, int]]:
    sorts = ((work.macs, max(work.weight_bits, work.input_bits)), (work.operand_macs, work.operand_bits))
    return [(macs, bits) for macs, bits in sorts if macs]
