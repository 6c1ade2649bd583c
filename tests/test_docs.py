"""The code in the README and in docs/ runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fewbits import TensorPlan
from fewbits.layers import base
from fewbits.quantizers import QUANTIZERS, make_quantizer

ROOT = Path(__file__).parent.parent
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def run(page: str) -> dict[str, object]:
    blocks = CODE.findall((ROOT / page).read_text(encoding="utf-8"))
    assert blocks
    names: dict[str, object] = {"__name__": "docs"}
    exec(compile("\n".join(blocks), page, "exec"), names)
    return names


def test_the_example_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("README.md")
    assert (tmp_path / "digits.onnx").stat().st_size > 0
    assert names["evaluate"](names["packed"], names["test"])["top1"] > 90


def test_the_page_on_hardware() -> None:
    names = run("docs/hardware.md")
    assert 0.8 < names["found"].energy_ratio < 0.9 and len(names["found"].layers) == 21


def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("docs/tutorial.md")
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(names["again"](x), names["packed"](x))


def test_the_page_on_allocation(capsys: pytest.CaptureFixture[str]) -> None:
    result = run("docs/allocation.md")["result"]
    assert result.status in ("ok", "abandon", "exhausted", "max_steps")
    assert f"{result.status}: " in capsys.readouterr().out


def test_the_page_on_fusion(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("docs/fusion.md")
    assert "{'cat0': BalancedFusion(cat of deep, shallow; controller)}" in capsys.readouterr().out
    assert not names["fusion_nodes"](names["student"]) and names["report"].nodes == {"cat0": "requant into up"}
    assert names["report"].folded == names["report"].constant_norm


def test_the_page_on_curricula() -> None:
    names = run("docs/curriculum.md")
    assert names["evaluate"](names["student"], names["test"])["top1"] > 60
    stages, task = names["curriculum"].stages, names["cross_entropy"]
    assert names["stage_loss"](stages[0], task)(names["student"], names["train"].gather([0, 1])) > 0


def test_the_page_on_language(capfd: pytest.CaptureFixture[str]) -> None:
    names = run("docs/language.md")
    assert names["generate"](names["packed"], names["prompt"], 20).shape == (1, 26)
    assert "left in float by the plan" in capfd.readouterr().out


def test_the_page_on_detection() -> None:
    names = run("docs/detection.md")
    assert names["loss"].item() > 0 and set(names["metrics"]["per_class"]) == set("0123456789")
    assert names["found"].boxes.shape == (len(names["found"].labels), 4)


def test_the_page_on_open_vocabulary() -> None:
    pytest.importorskip("transformers")
    names = run("docs/open_vocabulary.md")
    images = names["images"]
    assert names["outputs"].shape == (2, 84, 6) and names["packed"](images).shape == (2, 84, 7)
    torch.testing.assert_close(names["deployed"](images), names["packed"](images))
    assert names["loss"].isfinite() and names["student"].model.class_head.dense0.weight.grad.any()
    assert names["asked"].model.vocabulary.prompts == ("a green ring", "a cup") and len(names["found"].scores) < 84


def test_the_page_on_segmentation() -> None:
    names = run("docs/segmentation.md")
    assert 0 <= names["metrics"]["miou"] <= 100 and names["packed"] is not names["model"]


def test_the_quantizer_and_the_layer_of_extending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "TWINS", dict(base.TWINS))
    try:
        run("docs/extending.md")
        x = torch.randn(5, 7, requires_grad=True)
        quantizer = make_quantizer(TensorPlan(3, "power_of_two", granularity="channel"), shape=(5, 7))
        quantizer.calibrate(x.detach())
        assert torch.equal(quantizer(x), quantizer.encode(x.detach()).decode())
        quantizer(x).sum().backward()
        assert torch.equal(x.grad, torch.ones(5, 7))
    finally:
        QUANTIZERS.pop("power_of_two", None)
