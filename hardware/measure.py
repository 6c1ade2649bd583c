"""Simulate, synthesise and measure both MACs; print the tables of docs/results/hardware.md.

    python -m hardware.measure [--into docs/results/hardware.md]

It needs iverilog, yosys and the cell library qflow-tech-osu018 (Debian packages).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from fewbits.cost import code_cycles
from hardware.activity import Energy, switching_energy
from hardware.liberty import Cell, read_liberty
from hardware.tools import Design, library, missing, synthesise
from hardware.vectors import Operands, all_products, mismatches, of_a_layer, overflowing, random_and_extreme

CELLS = "osu018"
WIDTHS = (2, 4, 6, 8)
PRODUCTS = 2304  # 4 channels of 576 weights
INT8 = Design("INT8, carry-save array", "int8_mac", 8)
PLAIN = Design("INT8, a * w + acc left to Yosys", "int8_mac", 8, {"ARRAY": 0})
SERIAL = Design("shift-add, multiplexers", "shift_add_mac", 8, {"SHIFTER": 1, "WIDTHS": 1, "N": 8})
ONE_HOT = Design("shift-add, one-hot select", "shift_add_mac", 8, {"SHIFTER": 0, "WIDTHS": 1, "N": 8})
FIXED = [
    Design(f"shift-add, multiplexers, {n} bits only", "shift_add_mac", n, {"SHIFTER": 1, "WIDTHS": 0, "N": n})
    for n in (8, 4, 2)
]
GATES = [replace(d, name=f"{d.name}, without full-adder cells", adder_cells=False) for d in (INT8, SERIAL)]
PAPER_AREA, PAPER_ENERGY = -22.3, {2: 0.750, 4: 0.862}
START, END = "<!-- tables: python -m hardware.measure -->", "<!-- end of tables -->"


def main() -> None:
    """Do all of it; exit with what to install where a tool is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, help="put the tables into this file, between its two marks")
    into = parser.parse_args().into
    if what := missing("iverilog", "vvp", "yosys"):
        raise SystemExit(f"make hardware: {what} qflow-tech-{CELLS}")
    library(CELLS)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        lines = [versions(), "", *checks(work), "", *areas(work), "", *energies(work)]
    text = "\n".join(lines)
    print(text)
    if into is not None:
        before, rest = into.read_text().split(START)
        into.write_text(f"{before}{START}\n\n{text}\n\n{END}{rest.split(END)[1]}")


def versions() -> str:
    """Return the tools' versions."""
    queries = (["iverilog", "-V"], ["yosys", "-V"], ["dpkg-query", "-W", f"qflow-tech-{CELLS}"])
    said = (subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0] for query in queries)
    return "; ".join(" ".join(line.split()) for line in said)


def checks(work: Path) -> Iterator[str]:
    """Yield the table of simulations; exit where a circuit is wrong."""
    yield "| circuit | all products of 2, 4, 6, 8 bits | random and extreme sums | sums beyond 32 bits |"
    yield "| --- | ---: | ---: | ---: |"
    sets = [
        [(n, all_products(n)) for n in WIDTHS],
        [(n, random_and_extreme(n, 4000)) for n in WIDTHS],
        [(8, overflowing(8))],
    ]
    for design in (INT8, PLAIN, SERIAL, ONE_HOT):
        counts = [sum(_right(design, operands, bits, work) for bits, operands in every) for every in sets]
        yield f"| {design.name} | {' | '.join(f'{count:,} right' for count in counts)} |"


def _right(design: Design, operands: Operands, bits: int, work: Path) -> int:
    if wrong := mismatches(design, operands, bits, work=work):
        raise SystemExit(f"{design.name}: {wrong} of {len(operands[0])} products of {bits}-bit weights are wrong")
    return len(operands[0])


def areas(work: Path) -> Iterator[str]:
    """Yield the table of areas."""
    yield "| circuit | area, um2 | against INT8 | registers | full adders | other gates |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    _, cells = read_liberty(next(library(CELLS).glob("*_stdcells.lib")))
    base = {True: 0.0, False: 0.0}
    for design in (INT8, SERIAL, ONE_HOT, *FIXED, PLAIN, *GATES):
        parts = area(synthesise(design, CELLS, work), cells)
        total = sum(parts.values())
        base[design.adder_cells] = base[design.adder_cells] or total
        against = 100 * (total / base[design.adder_cells] - 1)
        numbers = " | ".join(f"{parts[part]:,.0f}" for part in ("registers", "adders", "gates"))
        yield f"| {design.name} | {total:,.0f} | {f'{against:+.1f} %' if against else ''} | {numbers} |"
    yield f"| the paper (28 nm), INT8 2,103.4 | 1,635.4 | {PAPER_AREA} % | | | |"


def area(netlist: Path, cells: dict[str, Cell]) -> Counter[str]:
    """Return the area of a netlist by registers, full adders and other gates."""
    (module,) = json.loads(netlist.with_suffix(".json").read_text())["modules"].values()
    parts: Counter[str] = Counter()
    for cell in module["cells"].values():
        kind = cell["type"]
        part = "registers" if kind.startswith("DFF") else "adders" if kind == "FAX1" else "gates"
        parts[part] += cells[kind].area
    return parts


def energies(work: Path) -> Iterator[str]:
    """Yield the table of energies."""
    columns = (
        "activations | circuit | weight bits | cycles | pJ a product | clock pins | other pins of registers | gates"
    )
    yield f"| {columns} | against INT8, 8 bits | per cycle | paper |"
    yield f"| --- | --- |{' ---: |' * 9}"
    for activations in ("relu", "uniform"):
        base = 0.0
        for design, bits in [*((INT8, n) for n in (8, 4, 2)), *((SERIAL, n) for n in WIDTHS)]:
            cycles, energy = measured(design, bits, activations, work)
            base = base or energy.total
            parts = (energy.total, energy.clock, energy.registers, energy.gates)
            numbers = [f"{cycles:.2f}", *(f"{part / PRODUCTS:.2f}" for part in parts)]
            numbers += [f"{energy.total / base:.3f}", f"{energy.total / base / cycles:.3f}"]
            paper = PAPER_ENERGY.get(bits, "") if design.serial else ""
            yield f"| {activations} | {design.name} | {bits} | {' | '.join(numbers)} | {paper} |"


def measured(design: Design, bits: int, activations: str, work: Path) -> tuple[float, Energy]:
    """Return the mean cycles and the energy (pJ) of PRODUCTS products on the netlist with the cells' delays."""
    operands = of_a_layer(bits, PRODUCTS, activations)
    volt, cells = read_liberty(next(library(CELLS).glob("*_stdcells.lib")))
    netlist = synthesise(design, CELLS, work)
    if wrong := mismatches(design, operands, bits, work=work, netlist=netlist, vcd=True):
        raise SystemExit(f"the netlist of {design.name} gets {wrong} products wrong")
    cycles = float(code_cycles(operands[2], bits).double().mean()) if design.serial else 1.0
    return cycles, switching_energy(netlist.with_suffix(".json"), work / "nets.vcd", cells, volt)


if __name__ == "__main__":
    main()
