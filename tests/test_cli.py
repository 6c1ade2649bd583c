from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fewbits.cli import main
from fewbits.recipes.read import find
from fewbits.recipes.runner import run
from tests.recipes.runs import shared_run
from tests.recipes.test_texts import recipe

VERBS = ("demo", "run", "resume", "allocate", "cost", "pack", "export", "verify", "bench", "detect", "report")


@pytest.fixture
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished smoke run."""
    return shared_run(tmp_path_factory)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    """Run the command line; return (exit code or message, stdout, stderr)."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    out, err = capsys.readouterr()
    return exit_.value.code, out, err


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Return what a command answers as JSON; nothing else may be on stdout."""
    code, out, _ = call(capsys, *arguments, "--json")
    assert code == 0
    data: dict[str, Any] = json.loads(out)
    return data


def test_help_is_quick_and_lists_the_verbs() -> None:
    program = (
        "import sys; sys.argv = ['fewbits', '--help']\n"
        "from fewbits.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'numpy', 'pydantic', 'yaml', 'onnx'} & set(sys.modules)))"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]", "heavy imports belong inside the commands"
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1


def test_wrong_usage_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "runn", "digits")[0] == 2
    assert call(capsys, "cost", "resnet20", "--input", "3.32.32")[0] == 2
    assert call(capsys, "export", "x", "--mode", "tiny")[0] == 2
    assert call(capsys, "cost", "resnet20", "--vocabulary", "3")[0] == 2
    assert call(capsys, "cost", "yolo-world:nano", "--vocabulary", "3", "--classes", "4")[0] == 2


def test_the_cost_of_resnet50_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "cost", "torchvision:resnet50", "--weight-bits", "8", "--input", "3,64,64")
    assert found["weights"] == 25_502_912 and len(found["layers"]) == 54
    assert 25_502_912 < found["bytes"] < 1.02 * 25_502_912
    assert found["bops"] == found["macs"] * 8 * 32
    of_hardware = {"cycles", "energy_uj", "latency_ms", "bound"}
    assert {"name", "kind", "weights", "bits", "bytes", "macs", "bops"} | of_hardware == set(found["layers"][0])
    assert 4.0 < found["cycles"] / found["macs"] < 4.1, "the shift-add MAC, on random weights"
    assert found["cycles"] == pytest.approx(sum(row["cycles"] for row in found["layers"]))
    assert set(found["energy_uj"]) == {"compute", "memory"} and found["hardware"]["weights"] == "random"


def test_the_cost_on_other_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "cost", "reference_cnn", "--act-bits", "8", "--hardware", "npu")
    assert found["cycles"] is None and found["hardware"]["latency_ratio"] == pytest.approx(1)
    code, out, _ = call(capsys, "cost", "reference_cnn", "--weight-bits", "4")
    assert code == 0 and "measured on random weights, float inputs fed as 8 bits" in " ".join(out.split())


def test_the_cost_of_a_language_model_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "cost", "gpt_nano", "--classes", "65", "--input", "16")
    assert found["input"] == [16] and {"blocks.0.attention.qkv", "head"} <= {row["name"] for row in found["layers"]}


def test_a_language_model_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(recipe(export=None).smoked(), tmp_path / "run", say=lambda text: None)
    capsys.readouterr()  # the table of layers
    found = answer(capsys, "bench", str(tmp_path / "run"), "--generate", "The ", "--tokens", "5")
    assert found["prompt"] == "The " and found["tokens"] == 5 and found["tokens_per_second"] > 0


def test_the_cost_of_an_open_vocabulary_detector(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("cost", "yolo-world:l", "--policy", "4-4-8", "--vocabulary", "1203")
    found = answer(capsys, *given)
    detector = found["detector"]
    assert found["texts"] == 1203 and detector["parameters"] == 47_553_954
    assert (round(detector["mib"], 2), round(detector["tbops"], 2)) == (24.32, 8.18)
    outside = detector["macs"]["region_text"] * 32 * 32
    assert found["bops"] + outside == pytest.approx(detector["tbops"] * 1e12)
    assert "hardware" not in found and sum(row["macs"] for row in found["layers"]) == found["macs"]
    code, out, _ = call(capsys, "cost", "yolo-world:nano", "--input", "3,64,64", "--hardware", "npu", "--act-bits", "8")
    assert code == 0 and "with 80 texts, as published work counts" in out and "npu: " in out


def test_an_allocation_becomes_a_plan_that_cost_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    found = answer(capsys, "allocate", "reference_cnn", "--average-bits", "3", "--act-bits", "4", "--out", str(plan))
    assert found["average_weight_bits"] <= 3 and found["decided_from"]["method"] == "solver"
    again = answer(capsys, "cost", "reference_cnn", "--plan", str(plan))
    assert again["bytes"] == found["bytes"] and again["bops"] == found["bops"]
    code, out, _ = call(capsys, "cost", "reference_cnn", "--plan", str(plan))
    assert code == 0 and "features.9" in out and "33,040 weights" in out


def test_an_allocation_on_hardware_is_told_as_cost_tells_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan, common = tmp_path / "plan.json", ("reference_cnn", "--act-bits", "8")
    given = ("--energy-uj", "0.1", "--hardware", "shift_add", "--first-last", "2", "--out", str(plan))
    for method in ("sigma", "solver"):
        found = answer(capsys, "allocate", *common, "--method", method, *given)
        spent = sum(found["energy_uj"].values())
        assert 0.05 < spent <= 0.1 and found["decided_from"]["method"] == method
        assert found["decided_from"]["predicted"]["energy_uj"] == pytest.approx(spent)
    again = answer(capsys, "cost", "reference_cnn", "--plan", str(plan), "--hardware", "shift_add")
    assert again["energy_uj"] == found["energy_uj"]
    code, out, _ = call(capsys, "allocate", *common, *given)
    assert code == 0 and "features.9" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "digit"], "error: there is no recipe 'digit'; did you mean 'digits'"),
        (["run", "digits", "--set", "qat.epoch=1"], "unknown key 'qat.epoch'; did you mean 'epochs'"),
        (["allocate", "reference_cnn", "--average-bits", "1"], "cannot be met: the least possible is"),
        (["allocate", "reference_cnn"], "needs at least one limit"),
        (["allocate", "reference_cnn", "--method", "sigma", "--size-mb", "0.001"], "size_bytes=1,000 cannot be met"),
        (["allocate", "reference_cnn", "--energy-uj", "3"], "energy_uj needs hardware="),
        (["allocate", "reference_cnn", "--energy-uj", "3", "--hardware", "cpus"], "did you mean 'cpu'"),
        (["allocate", "reference_cnn", "--average-bits", "3", "--method", "sigm"], "did you mean 'sigma'"),
        (["cost", "yolo-world:xl"], "got 'xl'; did you mean 'x'"),
        (["cost", "yolo-world:s", "--policy", "4-4"], "such as 4-4-8; got '4-4'"),
        (["cost", "yolo-world:s", "--input", "3,60,60"], "sides in multiples of 32, got [3, 60, 60]"),
        (["cost", "reference_cnn", "--policy", "4-4-8"], "is for an OpenVocabularyDetector, got a ReferenceCNN"),
        (["cost", "resnet21"], "'resnet21' is not among fewbits' own models; did you mean"),
        (["cost", "reference_cnn", "--weight-bits", "9"], "weight_bits must be one of"),
        (["cost", "reference_cnn", "--hardware", "npu"], "needs products of float, this hardware runs [4, 8, 16]"),
        (["cost", "reference_cnn", "--hardware", "cpus"], "there is no hardware 'cpus'; did you mean 'cpu'"),
        (["resume", "nothing"], "'nothing' is no run folder"),
        (["report", "nothing"], "result.json does not exist"),
        (["bench", "nothing.onnx"], "'nothing.onnx' is no run folder"),
        (["bench", "nothing", "--generate", "Once"], "'nothing' is no run folder"),
        (["cost", "gpt_nan"], "unknown GPT configuration 'gpt_nan'; did you mean 'gpt_nano'"),
        (["cost", "gpt_nano", "--input", "3,32,32"], "--input is the length of a window"),
    ],
)
def test_an_error_is_one_message_and_no_traceback(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    said, out, err = call(capsys, *arguments)
    assert isinstance(said, str), "python prints a message to stderr and ends with code 1"
    assert said.startswith("error: ") and message in said
    assert "Traceback" not in out + err and "\n" not in said


def test_an_unwritable_run_folder_is_told_before_any_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said, out, _ = call(capsys, "run", "digits", "--out", str(tmp_path / "file" / "run"))
    assert "cannot write in" in said and out == ""


def test_the_demo_replaces_an_earlier_demo_and_no_other_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = []
    monkeypatch.setattr("fewbits.cli._run", lambda *_, force, **__: replaced.append(force))
    for name in ("", "digits", "mine"):
        if name:
            data = yaml.safe_load(find("digits").read_text()) | {"name": name}
            (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
        assert call(capsys, "demo", "--out", str(tmp_path))[0] == 0
    assert replaced == [False, True, False]


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(Exception, match="there is no recipe"):
        main(["--debug", "run", "digit"])


def test_a_run_prints_a_table_and_as_json_nothing_else(
    capsys: pytest.CaptureFixture[str],
    finished_run: Path,
) -> None:
    code, out, _ = call(capsys, "resume", str(finished_run))
    assert code == 0 and "packed file" in out and str(finished_run / "report.html") in out
    found = answer(capsys, "resume", str(finished_run))
    assert found["packed"]["code_mismatches"] == 0 and found["folder"] == str(finished_run)


def test_the_verbs_on_a_finished_run(
    capsys: pytest.CaptureFixture[str],
    finished_run: Path,
    tmp_path: Path,
) -> None:
    folder = str(shutil.copytree(finished_run, tmp_path / "run"))
    assert answer(capsys, "verify", folder)["code_mismatches"] == 0
    assert answer(capsys, "pack", folder)["file_bytes"] > 0
    assert answer(capsys, "bench", folder, "--rounds", "1")["threads"] == 1
    assert Path(answer(capsys, "report", folder)["file"]).is_file()
    code, out, _ = call(capsys, "export", folder, "--mode", "smallest", "--to", str(tmp_path / "s.onnx"))
    assert code == 0 and "mode" in out and "smallest" in out
    said, _, _ = call(capsys, "run", "digits", "--out", folder)
    assert "holds a run already" in said and "--force" in said
    (tmp_path / "run/model.safetensors").write_bytes(b"damaged")
    for verb in ("verify", "export"):
        said, _, _ = call(capsys, verb, folder)
        assert "model.safetensors" in said and said.startswith("error: ")
