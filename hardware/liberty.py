"""Reads what energy needs from a Liberty file: pin capacitances and internal energy of the cells.

Units as in the file: pF, V, so pJ; a Liberty internal_power value is the energy of one transition inside the cell,
without what the load takes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

TOKEN = re.compile(r'"[^"]*"|[\w.+\-]+|[(){};:,]')
SLEW = 0.18  # ns, of the input that makes a cell switch: a table's second entry


@dataclass
class Group:
    """``kind (name) { attributes; groups }``."""

    kind: str
    name: str
    attributes: dict[str, list[str]] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)

    def of(self, kind: str) -> list[Group]:
        """Return the groups of a kind."""
        return [group for group in self.groups if group.kind == kind]

    def number(self, name: str) -> float:
        """Return a numeric attribute, 0 where it is not there."""
        return float(self.attributes.get(name, ["0"])[0])


@dataclass(frozen=True)
class Pin:
    """capacitance in pF; internal: tables (loads, slews, pJ) of a transition, rise and fall, for each cause."""

    name: str
    output: bool
    capacitance: float
    internal: tuple[tuple[list[float], list[float], list[list[float]]], ...]

    def energy(self, load: float) -> float:
        """Return the mean internal energy of a transition in pJ, with ``load`` pF on it."""
        return mean(_look_up(table, load) for table in self.internal) if self.internal else 0.0


@dataclass(frozen=True)
class Cell:
    """area in the library's units (square micrometres)."""

    name: str
    area: float
    pins: dict[str, Pin]


def read_liberty(path: Path) -> tuple[float, dict[str, Cell]]:
    """Return the nominal voltage and the cells by name."""
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S).replace("\\\n", " ")
    tokens = TOKEN.findall(text)
    top, _ = _group(tokens, 0)
    cells = {}
    for cell in top.of("cell"):
        pins = {pin.name: _pin(pin) for pin in cell.of("pin")}
        cells[cell.name] = Cell(cell.name, cell.number("area"), pins)
    return top.number("nom_voltage"), cells


def _group(tokens: list[str], at: int) -> tuple[Group, int]:
    """Read ``kind ( name ) {`` at ``at``; return the group and the place behind its closing brace."""
    close = tokens.index(")", at)
    group = Group(tokens[at], " ".join(t for t in tokens[at + 2 : close] if t != ",").strip('"'))
    at = close + 2
    while tokens[at] != "}":
        if tokens[at] == ";":
            at += 1
        elif tokens[at + 1] == ":":
            end = tokens.index(";", at)
            group.attributes[tokens[at]] = [tokens[at + 2].strip('"')]
            at = end + 1
        else:
            close = tokens.index(")", at)
            if tokens[close + 1 : close + 2] == ["{"]:
                inner, at = _group(tokens, at)
                group.groups.append(inner)
            else:
                group.attributes[tokens[at]] = [t.strip('"') for t in tokens[at + 2 : close] if t != ","]
                at = close + 1
    return group, at + 1


def _pin(pin: Group) -> Pin:
    tables = []
    for power in pin.of("internal_power"):
        for edge in (*power.of("rise_power"), *power.of("fall_power"), *power.of("power")):
            rows = [_numbers(text) for text in edge.attributes["values"]]
            first = _numbers(edge.attributes["index_1"][0])
            second = _numbers(edge.attributes["index_2"][0]) if "index_2" in edge.attributes else first
            tables.append(([0.0], second, rows) if len(rows) == 1 else (first, second, rows))
    output = pin.attributes.get("direction", [""])[0] == "output"
    return Pin(pin.name, output, pin.number("capacitance"), tuple(tables))


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.replace(",", " ").split()]


def _look_up(table: tuple[list[float], list[float], list[list[float]]], load: float) -> float:
    """Return the entry nearest to the load and to SLEW."""
    loads, slews, rows = table
    row = rows[min(range(len(rows)), key=lambda i: abs(loads[i] - load))]
    return row[min(range(len(row)), key=lambda i: abs(slews[i] - SLEW))]
