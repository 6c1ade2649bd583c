"""A description of hardware, read from a small YAML file, and what a layer costs on it.

Compute and memory energy are two numbers everywhere: the paper's MAC figures say nothing of a whole chip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from fewbits.cost.engines import Int8Mac, NotNegative, Positive, Roofline, Section, ShiftAddMac
from fewbits.cost.shapes import LayerShape
from fewbits.cost.work import Work, layer_work
from fewbits.errors import HardwareError, nearest
from fewbits.plan import LayerPlan

FOLDER = Path(__file__).parent
WORD_BYTES = 4
Engine = Annotated[Int8Mac | ShiftAddMac | Roofline, Field(discriminator="kind")]
Place = Literal["sram", "dram"]


class Memory(Section):
    """Where weights and inputs come from. Each is read once for the example; what a layer writes is not counted."""

    weights: Place
    """Memory that holds the weights."""
    inputs: Place
    """Memory that holds the activations."""
    sram_pj: NotNegative
    """Energy of one 32-bit word of the SRAM, in pJ."""
    dram_pj: NotNegative
    """Energy of one 32-bit word of the DRAM, in pJ."""
    dram_gb_per_s: Positive
    """Billions of bytes that the DRAM gives a second; the SRAM keeps up with the engine."""

    def picojoules(self, work: Work) -> float:
        """Return the energy of the reads."""
        prices = {"sram": self.sram_pj, "dram": self.dram_pj}
        priced = work.weight_bytes * prices[self.weights] + work.input_bytes * prices[self.inputs]
        return priced / WORD_BYTES

    def seconds(self, work: Work) -> float:
        """Return the time of the reads from the DRAM."""
        read = work.weight_bytes * (self.weights == "dram") + work.input_bytes * (self.inputs == "dram")
        return read / (self.dram_gb_per_s * 1e9)


class Hardware(Section):
    """One engine and its memory. notes: what the numbers are, and where they come from."""

    name: str
    notes: str
    engine: Engine
    memory: Memory

    @staticmethod
    def load(name_or_path: str | Path) -> Hardware:
        """Read a description that comes with fewbits, by name, or a YAML file.

        Raises HardwareError, naming file and field, for what is missing, negative, malformed or unknown.
        """
        path = _find(str(name_or_path))
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise HardwareError(f"cannot read the hardware {str(path)!r}: {' '.join(str(error).split())}") from error
        if not isinstance(data, dict):
            raise HardwareError(f"{path}: a hardware is a mapping with 'engine' and 'memory', got {data!r:.60}")
        try:
            return Hardware.model_validate({"name": path.stem, "notes": "", **data})
        except ValidationError as error:
            problems = "; ".join(_explain(e) for e in error.errors()[:3])
            raise HardwareError(f"{path}: {problems}") from error

    @property
    def measures_cycles(self) -> bool:
        """Whether energy and latency need the mean cycles of each layer's codes."""
        return isinstance(self.engine, ShiftAddMac) and self.engine.cycles_from == "measured"


@dataclass(frozen=True)
class LayerEnergy:
    """Microjoules of one layer: of its products, and of reading weight and input."""

    compute: float
    memory: float

    @property
    def total(self) -> float:
        """Both."""
        return self.compute + self.memory


def hardware_names() -> list[str]:
    """Return the names of the descriptions that come with fewbits."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def layer_energies(
    layer: LayerShape, plan: LayerPlan | None, hardware: Hardware, cycles: float | None = None
) -> LayerEnergy:
    """Return the energy of one layer for the example, compute apart from memory.

    cycles: mean cycles of one of its products, needed where ``hardware.measures_cycles``. Raises HardwareError for
    what the hardware cannot run.
    """
    work = layer_work(layer, plan)
    memory = hardware.memory.picojoules(_as_read(work, hardware))
    return LayerEnergy(hardware.engine.picojoules(work, cycles) / 1e6, memory / 1e6)


def layer_energy(layer: LayerShape, plan: LayerPlan | None, hardware: Hardware, cycles: float | None = None) -> float:
    """Return compute plus memory energy in microjoules; arguments and errors as of ``layer_energies``."""
    return layer_energies(layer, plan, hardware, cycles).total


def layer_latency(layer: LayerShape, plan: LayerPlan | None, hardware: Hardware, cycles: float | None = None) -> float:
    """Return milliseconds for the example: the longer of computing and reading, which run side by side."""
    work = layer_work(layer, plan)
    reading = hardware.memory.seconds(_as_read(work, hardware))
    return 1e3 * max(hardware.engine.seconds(work, cycles), reading)


def _as_read(work: Work, hardware: Hardware) -> Work:
    """Return the work with the widths that the engine has for activations."""
    return work if isinstance(hardware.engine, Roofline) else work.fed_as_bytes()


def _find(name: str) -> Path:
    own, path = FOLDER / f"{name}.yaml", Path(name).expanduser()
    if name in hardware_names():
        return own
    if path.is_file():
        return path
    known = hardware_names()
    raise HardwareError(
        f"there is no hardware {name!r}{nearest(name, known)}; known: {', '.join(known)}, or give the path of a file"
    )


def _explain(error: ErrorDetails) -> str:
    """Say which field is wrong, and what would be right."""
    where = ".".join(str(part) for part in error["loc"] if part not in ("int8_mac", "shift_add", "roofline"))
    if error["type"] == "extra_forbidden":
        fields = {name for s in (Hardware, Memory, Int8Mac, ShiftAddMac, Roofline) for name in s.model_fields}
        return f"unknown field {where!r}{nearest(str(error['loc'][-1]), sorted(fields), 1)}"
    if error["type"] == "missing":
        return f"the field {where!r} is missing"
    if error["type"].startswith("union_tag"):
        return f"{where}.kind must be int8_mac, shift_add or roofline, got {error['input']!r:.80}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] == "value_error" else f", got {error['input']!r:.60}"
    return f"{where}: {message}{given}{_number_hint(error)}"


def _number_hint(error: ErrorDetails) -> str:
    """Say how to write a number that YAML takes as text, such as 6e2."""
    given = error["input"]
    if error["type"] not in ("float_type", "int_type") or not isinstance(given, str):
        return ""
    try:
        number = float(given)
    except ValueError:
        return ""
    return f"; YAML takes that as text: write {number:.12g}" if math.isfinite(number) else ""
