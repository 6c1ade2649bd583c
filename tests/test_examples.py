"""Each example runs on its own, and shows what it says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from fewbits.quantizers import QUANTIZERS

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, text
    return [float(n.replace(",", "")) for n in found.groups()]


def test_training_in_your_own_loop(capsys: pytest.CaptureFixture[str]) -> None:
    out = run("train_in_your_own_loop", capsys)
    trained, packed, size = numbers(r"trained ([\d.]+) %, packed ([\d.]+) %, (\d+) bytes", out)
    assert trained > 93 and abs(packed - trained) <= 0.6  # folding the norms may move an answer on the border
    assert size < 12_000
    assert numbers(r"same class for ([\d.]+) %", out)[0] >= 99


def test_a_plan_for_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    out = run("budget", capsys)
    size, bits, _ = numbers(r"budget of 4 MB +([\d.]+) +([\d.]+) +(\d+)", out)
    assert 3.8 < size <= 4.0 and 2 < bits < 4
    assert numbers(r"layer4\.1\.conv2 +([\d,]+) +(\d)", out)[0] == 512 * 512 * 9


def test_a_quantizer_of_your_own(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        out = run("add_a_quantizer", capsys)
    finally:
        QUANTIZERS.pop("ternary", None)
    right, differing = numbers(r"ternary: ([\d.]+) % of the test digits, (\d+) codes", out)
    assert right > 90 and differing == 0


def test_examples_are_short() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert len(files) >= 3
    assert all(len(p.read_text(encoding="utf-8").splitlines()) < 100 for p in files)
