"""The pictures of a search: places follow the numbers, and what is missing is left out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fewbits.errors import DataError
from fewbits.report import write_report
from fewbits.report.layers import bit_map
from fewbits.report.schema import Hardware, Layer, Search
from fewbits.report.search import Zone, front, hardware, history, sigma_and_kl, way


def example_search() -> dict[str, Any]:
    """Return a search of three layers that ends in its target after a phase of each kind."""
    return {
        "status": "ok",
        "reference": {"accuracy": 92.0, "costs": {"size_bytes": 1000.0, "average_bits": 8.0}},
        "targets": {"accuracy": 90.0, "size_bytes": 500.0},
        "buffers": {"accuracy": 2.0, "size_bytes": 100.0},
        "layers": [
            {"name": "conv1", "sigma": 0.3, "kl": {"2": 9.0, "4": 3.0}, "cluster": 1},
            {"name": "conv2", "sigma": 0.1, "kl": {"2": 12.0, "4": 5.0}, "cluster": 0},
            {"name": "fc", "sigma": 0.2, "kl": {"2": None, "4": 4.0}, "cluster": 0},
        ],
        "log": [
            step(1, 1, (4, 2, 2), 80.0, 300.0, "bit-increase"),
            step(2, 2, (4, 4, 2), 88.0, 450.0, "bit-increase", ["conv2"]),
            step(3, 2, (4, 4, 4), 87.0, 550.0, "transition", ["fc"]),
            step(4, 2, (6, 4, 2), 90.5, 490.0, "target", ["conv1", "fc"]),
        ],
    }  # fmt: skip


def step(
    number: int,
    phase: int,
    bits: tuple[int, int, int],
    accuracy: float,
    size: float,
    region: str,
    moved: list[str] | None = None,
) -> dict[str, Any]:
    named = dict(zip(("conv1", "conv2", "fc"), bits))
    costs = {"size_bytes": size, "average_bits": 1.0}
    return {"step": number, "phase": phase, "bits": named, "accuracy": accuracy, "costs": costs, "region": region,
            "moved": moved or [], "status": ""}  # fmt: skip


def read(**changes: Any) -> Search:
    return Search.model_validate({**example_search(), **changes})


def test_divergence_over_sigma_one_plane_a_width() -> None:
    two, four = sigma_and_kl(read())
    assert (two.title, len(two.spots), len(four.spots)) == ("KL divergence at 2 bits", 2, 3)
    first, second, third = four.spots
    assert second.x < third.x < first.x and first.y < third.y < second.y
    assert (first.colour, second.colour, third.colour) == ("s1", "s0", "s0")
    assert first.tip == "conv1\nsigma 0.3\nKL at 4 bits 3"
    assert [label for _, label in four.legend] == ["cluster 0", "cluster 1"]
    assert all(0 <= spot.x <= 100 and 0 <= spot.y <= 100 for spot in four.spots)
    assert sigma_and_kl(read(layers=[{"name": "fc", "sigma": math.nan, "kl": {"2": 1.0}}])) == []


def test_widths_are_in_the_order_of_numbers() -> None:
    layer = {"name": "fc", "sigma": 1.0, "kl": {"16": 0.1, "2": 9.0, "8": 1.0}}
    assert [chart.title.split()[3] for chart in sigma_and_kl(read(layers=[layer]))] == ["2", "8", "16"]


def test_the_way_with_its_zones() -> None:
    chart = way(read())
    assert chart is not None and chart.x_label == "size"
    assert [spot.colour for spot in chart.spots] == ["p0", "s0", "s1", "s1", "s1"]
    assert chart.spots[4].tip == "step 4, phase 2\naccuracy 90.5\nsize 490 B\ntarget\nmoved conv1, fc"
    zones = {zone.name: zone for zone in chart.zones}
    assert list(zones) == ["target", "bit-decrease", "bit-increase", "transition", "beyond"]

    def inside(index: int) -> list[str]:
        x, y = 10 * chart.spots[index].x, 1000 - 10 * chart.spots[index].y
        return [z.name for z in chart.zones if z.x <= x <= z.x + z.width and z.y <= y <= z.y + z.height]

    assert [inside(i) for i in range(5)] == [
        ["bit-decrease"], ["bit-increase"], ["bit-increase"], ["transition"], ["target"],
    ]  # fmt: skip
    beyond, edge = zones["beyond"], zones["transition"]
    assert beyond.x > edge.x and beyond.y > edge.y and beyond.x + beyond.width == pytest.approx(1000)
    assert covered(chart.zones[:4]) == pytest.approx(1e6)


def covered(zones: list[Zone]) -> float:
    return sum(zone.width * zone.height for zone in zones)


def test_the_path_joins_the_steps_and_the_front() -> None:
    chart = way(read())
    assert chart is not None
    (path, grey), (best, green) = chart.lines
    assert (path.count("L"), grey, green) == (3, "p0", "s2")
    assert best.count("L") == 2  # the step to 550 bytes is beaten
    places = [tuple(map(float, place.split())) for place in path[1:].split("L")]
    assert places[0][0] < places[1][0] < places[3][0] < places[2][0]
    assert places[3][1] < places[1][1] < places[2][1] < places[0][1]


def test_the_front_holds_what_nothing_beats() -> None:
    assert front([(3, 5), (1, 1), (2, 4), (2, 3), (4, 5), (1, 1)]) == [(1, 1), (2, 4), (3, 5)]


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ({"accuracy": None, "size_bytes": 500.0}, ["target", "bit-decrease"]),
        ({"accuracy": 90.0}, ["target", "bit-increase"]),
        ({}, []),
    ],
)
def test_zones_of_targets_that_are_not_given(targets: dict[str, Any], names: list[str]) -> None:
    chart = way(read(targets=targets))
    assert chart is not None and [zone.name for zone in chart.zones] == names
    assert covered(chart.zones) == pytest.approx(1e6 if names else 0)


def test_the_leading_cost_is_the_first_target() -> None:
    chart = way(read(targets={"accuracy": 90.0, "average_bits": 4.0}))
    assert chart is not None and chart.x_label == "bits a weight"
    assert way(read(log=[])) is None
    assert way(read(log=[{"step": 1, "accuracy": math.nan, "costs": {"size_bytes": 3.0}}])) is None


def test_bits_over_the_steps_are_runs() -> None:
    found = history(read())
    assert found is not None and found.steps == 4
    rows = {name: [(run.start, run.length, run.colour) for run in runs] for name, runs in found.rows}
    assert rows == {
        "conv1": [(0, 3, "b4"), (3, 1, "b6")],
        "conv2": [(0, 1, "b2"), (1, 3, "b4")],
        "fc": [(0, 2, "b2"), (2, 1, "b4"), (3, 1, "b2")],
    }
    assert found.rows[0][1][0].tip == "conv1\n4 bits\nstep 1 to 3"
    assert found.legend == [("b2", "2 bit"), ("b4", "4 bit"), ("b6", "6 bit")]
    assert history(read(log=example_search()["log"][:1])) is None


def test_what_the_hardware_makes_of_the_layers() -> None:
    rows = [
        {"name": "conv1", "cycles": 4.0, "compute_energy_uj": 2.0, "memory_energy_uj": None},
        {"name": "fc", "cycles": 1.0, "compute_energy_uj": 8.0},
    ]
    layers = [Layer(name="conv1", weight_bits=8), Layer(name="fc", weight_bits=2)]
    sky = hardware(Hardware.model_validate({"name": "array", "layers": rows}), layers)
    assert sky is not None and sky.names == ["conv1", "fc"]
    cycles, energy = sky.strips
    assert [(bar.height, bar.colour) for bar in cycles.bars] == [(100, "b8"), (25, "b2")]
    assert [bar.height for bar in energy.bars] == [25, 100] and energy.top == "8"
    assert hardware(None, layers) is None
    assert hardware(Hardware(layers=[]), layers) is None
    assert bit_map(layers).names == sky.names


def test_the_page_has_them_and_reads_hostile_names(run_folder: Path, result: dict[str, Any]) -> None:
    search = example_search()
    search["layers"][0]["name"] = "<script>alert(1)</script>"
    rows = [{"name": layer["name"], "cycles": 1.5} for layer in result["plan"]["layers"]]
    result |= {"search": search, "hardware": {"name": "shift-add array", "layers": rows}}
    (run_folder / "result.json").write_text(json.dumps(result))
    page = write_report(run_folder).read_text(encoding="utf-8")
    assert 'id="search"' in page and 'id="hardware"' in page and "shift-add array" in page
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page
    assert page.count('class="spot ') == 2 + 3 + 5
    assert "the status ok." in page
    search["message"] = "abandon: out of reach: accuracy is 1 below"
    (run_folder / "result.json").write_text(json.dumps(result))
    assert "the status abandon: out of reach: accuracy is 1 below." in write_report(run_folder).read_text("utf-8")


def test_a_page_without_a_search_has_neither(run_folder: Path) -> None:
    page = write_report(run_folder).read_text(encoding="utf-8")
    assert 'id="search"' not in page and 'id="hardware"' not in page


def test_a_malformed_search_is_named(run_folder: Path, result: dict[str, Any]) -> None:
    result["search"] = example_search() | {"log": [{"step": "first"}]}
    (run_folder / "result.json").write_text(json.dumps(result))
    with pytest.raises(DataError, match=r"search\.log\.0\.step"):
        write_report(run_folder)
