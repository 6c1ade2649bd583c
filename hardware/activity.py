"""Energy from switching: toggles of every net of a netlist in a VCD, times what a toggle takes.

A toggle of a net takes C V^2 / 2, with C the capacitance of the input pins on it, and the internal energy of the cell
that drives it and of the pins that it drives (clock and data pins of registers). Wires, the clock tree and leakage are
left out.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from hardware.liberty import Cell


@dataclass(frozen=True)
class Energy:
    """pJ, all of them: at the clock pins of registers, of registers' outputs and data, and of gates."""

    clock: float
    registers: float
    gates: float

    @property
    def total(self) -> float:
        """All."""
        return self.clock + self.registers + self.gates


def switching_energy(netlist: Path, vcd: Path, cells: dict[str, Cell], volt: float) -> Energy:
    """Return the energy of all that a VCD shows; ``netlist`` is the JSON that Yosys wrote."""
    (module,) = json.loads(netlist.read_text())["modules"].values()
    load: dict[int, float] = defaultdict(float)
    pins: dict[int, list[tuple[Cell, str]]] = defaultdict(list)
    for cell in module["cells"].values():
        kind = cells[cell["type"]]
        for pin, (bit,) in cell["connections"].items():
            pins[bit].append((kind, pin))
            load[bit] += kind.pins[pin].capacitance
    parts = {"clock": 0.0, "registers": 0.0, "gates": 0.0}
    for bit, count in toggles(module, vcd).items():
        charge = load[bit] * volt**2 / 2
        inside = sum(kind.pins[pin].energy(load[bit]) for kind, pin in pins[bit])
        parts[_part(pins[bit])] += count * (charge + inside)
    return Energy(**parts)


def _part(pins: list[tuple[Cell, str]]) -> str:
    if any(pin == "CLK" for _, pin in pins):
        return "clock"
    from_register = any(cell.pins[pin].output and cell.name.startswith("DFF") for cell, pin in pins)
    return "registers" if from_register else "gates"


def toggles(module: dict, vcd: Path) -> Counter[int]:
    """Return how often each net, by its bit in the netlist, changed between 0 and 1."""
    bits = {name: net["bits"] for name, net in module["netnames"].items()}
    nets: dict[str, list[int]] = {}  # of each VCD code, most significant first
    last: dict[str, str] = {}
    count: Counter[int] = Counter()
    seen: set[int] = set()
    for line in vcd.read_text().splitlines():
        if line.startswith("$var"):
            _, _, width, code, name, *place = line.split()
            own = bits.get(name.lstrip("\\") + (place[0] if place[0] != "$end" and int(width) == 1 else ""))
            own = own or bits.get(name.lstrip("\\"))
            if own is not None and not seen.issuperset(own):
                seen.update(own)
                nets[code] = own[::-1]
        elif found := re.fullmatch(r"b?([01xz]+) ?(\S+)", line):
            value, code = found.groups()
            if code in nets:
                value = value.rjust(len(nets[code]), "0" if value[0] in "01" else value[0])
                for net, old, new in zip(nets[code], last.get(code, value), value):
                    count[net] += {old, new} == {"0", "1"}
                last[code] = value
    used = {bit for cell in module["cells"].values() for net in cell["connections"].values() for bit in net}
    missing = {bit for bit in used if isinstance(bit, int)} - seen  # a constant is a text
    if missing:
        raise SystemExit(f"{len(missing)} nets of the netlist are not in {vcd}")
    return count
