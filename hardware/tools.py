"""Icarus Verilog and Yosys: where they are, and running them."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parent
RTL = sorted((FOLDER / "rtl").glob("*.v"))
CIRCUITS = [path for path in RTL if path.stem != "mac_tb"]
PACKAGES = {"iverilog": "iverilog", "vvp": "iverilog", "yosys": "yosys"}
CELLS = Path("/usr/share/qflow/tech")


@dataclass(frozen=True)
class Design:
    """A circuit to build: top module, bits of its weight port, its parameters, and whether adders become the library's
    full adders or are left to the synthesiser.
    """

    name: str
    top: str
    bits: int
    parameters: dict[str, int] = field(default_factory=dict, hash=False)
    adder_cells: bool = True

    @property
    def serial(self) -> bool:
        """Whether it is the serial MAC."""
        return self.top == "shift_add_mac"


def missing(*tools: str) -> str:
    """Return what to install for these tools, or an empty string where all are there."""
    packages = {PACKAGES[tool] for tool in tools if shutil.which(tool) is None}
    return f"install the Debian packages: apt-get install {' '.join(sorted(packages))}" if packages else ""


def library(name: str) -> Path:
    """Return the folder of a cell library, such as osu018. Exits, saying what to install, where it is not there."""
    folder = CELLS / name
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not there: apt-get install qflow-tech-{name}")
    return folder


def call(*command: str | Path, within: Path) -> str:
    """Run a tool and return what it prints. Exits with its errors where it fails."""
    done = subprocess.run([str(part) for part in command], cwd=within, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def simulate(
    design: Design, vectors: str, bits: int, work: Path, netlist: Path | None = None, vcd: bool = False
) -> str:
    """Return what the test bench writes for vectors of weights of ``bits``; of a netlist with the cells' delays."""
    (work / "vectors.txt").write_text(vectors)
    defines = {"BITS": design.bits, "VECTORS": '"vectors.txt"', "RESULTS": '"results.txt"'}
    defines |= {"SERIAL": 1, "WIDTH": bits // 2 - 1} if design.serial else {}
    defines |= {"DUMP": '"nets.vcd"'} if vcd else {}
    given = [f"-D{name}={value}" for name, value in defines.items()]
    if netlist is None:
        chosen = ", ".join(f".{name}({value})" for name, value in design.parameters.items())
        given += [f"-DPARAMETERS=#({chosen})"] if chosen else []
        sources = RTL
    else:
        sources = [FOLDER / "rtl" / "mac_tb.v", netlist, *library(netlist.parent.name).glob("*_stdcells.v")]
        given += ["-gspecify", "-Ttyp"]
    call("iverilog", "-g2012", *given, "-s", "mac_tb", "-o", "simulation", *sources, within=work)
    call("vvp", "-n", "simulation", within=work)
    return (work / "results.txt").read_text()


def synthesise(design: Design, cells: str, work: Path) -> Path:
    """Return the netlist of a design in a cell library, ``work/CELLS/NAME.v``, with its JSON beside it."""
    liberty = next(library(cells).glob("*_stdcells.lib"))
    (work / cells).mkdir(exist_ok=True)
    stem = work / cells / re.sub(r"\W+", "_", design.name)
    parameters = "".join(f" -set {name} {value}" for name, value in design.parameters.items())
    steps = [
        *(f"read_verilog {path}" for path in CIRCUITS),
        f"chparam{parameters} {design.top}" if parameters else "",
        "" if design.adder_cells else "setattr -mod -unset keep_hierarchy full_adder",
        f"synth -flatten -run begin:fine -top {design.top}",
        "opt -full",
        f"techmap -map {FOLDER / 'techmap' / 'full_adder.v'}" if design.adder_cells else "",
        "synth -run fine:check",
        f"dfflibmap -liberty {liberty}",
        f"abc -liberty {liberty}",
        f"hierarchy -top {design.top}",
        "opt_clean -purge",
        "splitnets",
        "rename -enumerate",
        f"write_json {stem}.json",
        f"write_verilog -noattr -noexpr {stem}.v",
        f"stat -liberty {liberty}",
    ]
    call("yosys", "-q", "-l", f"{stem}.log", "-p", "; ".join(step for step in steps if step), within=work)
    return stem.with_suffix(".v")
