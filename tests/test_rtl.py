"""The Verilog of both MACs against the Python simulator, where Icarus Verilog is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hardware import tools
from hardware.activity import toggles
from hardware.liberty import read_liberty
from hardware.measure import INT8, ONE_HOT, PLAIN, SERIAL
from hardware.tools import Design, missing
from hardware.vectors import all_products, as_lines, expected, mismatches, of_a_layer, random_and_extreme

needs_icarus = pytest.mark.skipif(bool(missing("iverilog", "vvp")), reason=missing("iverilog", "vvp"))


@needs_icarus
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("design", [INT8, SERIAL, ONE_HOT], ids=lambda design: design.name)
def test_every_product_is_that_of_the_simulator(design: Design, bits: int, tmp_path: Path) -> None:
    assert mismatches(design, all_products(bits), bits, work=tmp_path) == 0


@needs_icarus
@pytest.mark.parametrize("bits", [2, 6, 8])
@pytest.mark.parametrize("design", [INT8, PLAIN, SERIAL], ids=lambda design: design.name)
def test_sums_of_random_and_extreme_operands(design: Design, bits: int, tmp_path: Path) -> None:
    assert mismatches(design, random_and_extreme(bits, 500), bits, work=tmp_path) == 0


@needs_icarus
def test_a_serial_mac_of_one_width(tmp_path: Path) -> None:
    four = replace(SERIAL, bits=4, parameters={"SHIFTER": 1, "WIDTHS": 0, "N": 4})
    assert mismatches(four, all_products(4), 4, work=tmp_path) == 0


@needs_icarus
def test_a_wrong_circuit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.v"
    right = next(path for path in tools.RTL if path.stem == "shift_add_mac")
    broken.write_text(right.read_text().replace(".carry_in(subtract)", ".carry_in(1'b0)"))
    monkeypatch.setattr(tools, "RTL", [broken, *(path for path in tools.RTL if path != right)])
    subtracted = 512  # products with -2 and -1
    assert mismatches(SERIAL, all_products(2), 2, work=tmp_path) == subtracted


def test_expected_sums_wrap_around_and_start_anew_where_cleared() -> None:
    clear, a, w = torch.tensor([1, 0, 1]), torch.tensor([-128, -1, 5]), torch.tensor([1, 1, -2])
    assert expected((clear, a, w), 2, serial=True) == "ffffff80 1\nffffff7f 1\nfffffff6 1\n"
    assert as_lines((clear, a, w), 2) == "1 80 1\n0 ff 1\n1 5 2\n"


def test_the_weights_of_a_layer_are_those_of_the_quantizer() -> None:
    clear, a, w = of_a_layer(4, 1152, "relu")
    assert clear.sum() == 1 and int(w.abs().max()) == 7 and int(a.min()) == 0 and int(a.max()) == 127
    assert 0.4 < float((a == 0).double().mean()) < 0.6


LIBERTY = """
library(tiny) { /* a comment */
  nom_voltage : 2.0;
  capacitive_load_unit (1,pf);
  cell (INV) {
    area : 3;
    pin(A) { direction : input; capacitance : 0.5; }
    pin(Y) { direction : output; capacitance : 0; function : "(!A)";
      internal_power() { related_pin : "A";
        rise_power(t) { index_1 ("0.1, 0.2"); index_2 ("0.18, 0.4"); values ( \\
          "1.0, 9.0", \\
          "3.0, 9.0"); }
        fall_power(t) { index_1 ("0.1, 0.2"); index_2 ("0.18, 0.4"); values ("2.0, 9.0", "5.0, 9.0"); }
      }
    }
  }
}
"""


def test_a_liberty_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "tiny.lib").write_text(LIBERTY)
    volt, cells = read_liberty(tmp_path / "tiny.lib")
    pins = cells["INV"].pins
    assert volt == 2.0 and cells["INV"].area == 3 and pins["A"].capacitance == 0.5 and pins["Y"].output
    assert pins["A"].energy(0.1) == 0 and pins["Y"].energy(0.11) == 1.5 and pins["Y"].energy(0.9) == 4.0


def test_toggles_are_counted_bit_by_bit(tmp_path: Path) -> None:
    lines = [
        *("$var wire 1 ! clk $end", '$var wire 2 " acc [1:0] $end', "$var wire 1 # \\x[3] $end", "$dumpvars"),
        *("0!", 'b1 "', "x#", "$end", "#1", "1!", 'b10 "', "1#", "#2", "0!", 'b11 "', "0#"),
    ]
    (tmp_path / "nets.vcd").write_text("\n".join(lines))
    nets = {"clk": {"bits": [2]}, "acc": {"bits": [3, 4]}, "x[3]": {"bits": [5]}}
    cell = {"connections": {"A": [2], "B": [3], "C": [4], "D": [5], "E": ["0"]}}
    count = toggles({"netnames": nets, "cells": {"c": cell}}, tmp_path / "nets.vcd")
    assert count == {2: 2, 3: 2, 4: 1, 5: 1}, "what was unknown before is no toggle"
