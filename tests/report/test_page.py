"""The page: what is on it, what is said to be missing, that strings stay strings, and the errors."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fewbits.errors import FewbitsError
from fewbits.report import write_report

SECTIONS = [
    "summary", "bits", "size", "accuracy", "confusion", "curves", "errors", "histograms", "layers", "float", "run",
]  # fmt: skip
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7*7 }}"


class Page(HTMLParser):
    """Collects what a test asks of a page: tags, ids, attributes that name resources, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.resources: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.resources += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        self.handlers += [key for key in given if key.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def written(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def store(folder: Path, result: Any) -> None:
    (folder / "result.json").write_text(json.dumps(result))


def test_every_section_of_a_whole_result_is_there(run_folder: Path, result: dict[str, Any]) -> None:
    assert write_report(run_folder) == run_folder / "report.html"
    page = written(run_folder)
    assert [i for i in page.ids if i in SECTIONS] == SECTIONS
    assert "missing" not in page.ids
    for layer in result["plan"]["layers"]:
        assert layer["name"] in page.text
    assert "12.5× smaller, 0.80 points lower top-1 than float." in page.text  # noqa: RUF001
    assert "folded into scale and offset when packed" in page.text
    assert not list(run_folder.glob("*.draft"))


def test_the_page_names_no_outside_resource(run_folder: Path) -> None:
    html = write_report(run_folder).read_text(encoding="utf-8")
    assert Page(html).resources == ["data:,"]
    assert not re.search(r"https?:|//[a-z]+\.|url\(|@import", html.replace("http-equiv", ""))
    assert len(html) < 300_000


@pytest.mark.parametrize(
    ("part", "section", "named"),
    [
        ("onnx", "summary", "ONNX Runtime"),
        ("size", "size", "the size of the packed file's parts"),
        ("plan", "bits", "the layers of the plan"),
        ("histograms", "histograms", "weight histograms"),
        ("environment", "run", "the environment"),
        ("float", "summary", "the float model"),
    ],
)
def test_a_missing_part_is_left_out_and_named(
    run_folder: Path, result: dict[str, Any], part: str, section: str, named: str
) -> None:
    del result[part]
    store(run_folder, result)
    page = written(run_folder)
    told = page.text.split("because the run folder does not hold it:")[1].split(".")[0]
    assert named in told
    assert (section in page.ids) == (section in ("summary", "size", "run"))


def test_an_empty_result_still_gives_a_page(tmp_path: Path) -> None:
    store(tmp_path, {})
    page = written(tmp_path)
    assert "no comparison with a float model" in page.text
    assert not set(page.ids) & set(SECTIONS)
    assert "training curves" in page.text


def test_strings_of_the_result_stay_strings(run_folder: Path, result: dict[str, Any]) -> None:
    plain = written(run_folder).tags
    result["recipe"] = result["task"] = result["fewbits"] = HOSTILE
    result["classes"] = [HOSTILE] * 10
    result["environment"] = {HOSTILE: HOSTILE}
    result["histograms"] = {name + HOSTILE: value for name, value in result["histograms"].items()}
    for layer in result["plan"]["layers"]:
        layer.update(name=layer["name"] + HOSTILE, kind=HOSTILE, quantizer=HOSTILE)
    store(run_folder, result)
    with (run_folder / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 1, "stage": HOSTILE, "loss": 1.0}) + "\n")
    page = written(run_folder)
    assert {tag: page.tags.count(tag) for tag in ("script", "img", "section")} == {
        tag: plain.count(tag) for tag in ("script", "img", "section")
    }
    assert page.handlers == []
    assert HOSTILE in page.text


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "does not exist"),
        ("{", "cannot be read as JSON"),
        ("[1]", "must hold a JSON object, got list"),
        ('{"plan": {"layers": [{"name": "fc", "weight_bits": "four"}]}}', "plan.layers.0.weight_bits"),
        ('{"plan": {"layers": [{}]}}', "plan.layers.0.name"),
        ('{"float": 3}', "float: "),
        ('{"histograms": {"fc": {"edges": [0, 1], "counts": [1, 2]}}}', "2 counts need 3 edges, got 2"),
        ('{"histograms": {"fc": {"edges": [1, 0], "counts": [1]}}}', "edges must ascend"),
        ('{"quantized": {"metrics": {"confusion": [[1, 2]]}}}', "square"),
        ('{"quantized": {"metrics": {"confusion": [[-1]]}}}', "not negative"),
    ],
)
def test_a_bad_result_is_a_named_error(tmp_path: Path, content: str | None, told: str) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(FewbitsError) as error:
        write_report(tmp_path)
    assert told in str(error.value)
    assert str(tmp_path / "result.json") in str(error.value)
    assert "fewbits run" in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_cannot_be_written_is_a_named_error(run_folder: Path) -> None:
    (run_folder / "report.html").mkdir()
    with pytest.raises(FewbitsError, match=r"cannot write .*report\.html"):
        write_report(run_folder)
    assert not list(run_folder.glob("*.draft"))


def test_same_input_same_page(run_folder: Path) -> None:
    assert write_report(run_folder).read_bytes() == write_report(run_folder).read_bytes()
