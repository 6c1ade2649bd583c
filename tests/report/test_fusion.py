from __future__ import annotations

from fewbits.report.fusion import forms, rows
from fewbits.report.load import Log
from fewbits.report.page import render
from fewbits.report.schema import Fusion, Result

NODE = {
    "name": "neck.cat0",
    "branches": ["deep", "shallow"],
    "gains": [0.25, 0.75],
    "log_ratio": -0.031,
    "folded": "requant into <conv>",
}
GIVEN = {"forms": {"true norm": {"map": 41.2}, "folded": {"map": 40.5}, "constant norm": {}}, "nodes": [NODE]}


def test_forms_have_the_headline_metric_and_nodes_a_row() -> None:
    fusion = Fusion.model_validate(GIVEN)
    assert forms(fusion, "map") == [("mAP, true norm", "41.20 %"), ("mAP, folded", "40.50 %")]
    assert forms(fusion, None) == []
    assert rows(fusion) == [["neck.cat0", "deep 0.25, shallow 0.75", "\N{MINUS SIGN}0.031", "requant into <conv>"]]


def test_the_page_shows_fusion_where_there_was_some() -> None:
    page = render(Result.model_validate({"headline": "map", "fusion": GIVEN}), Log([]))
    assert "Balanced fusion" in page and "40.50 %" in page and "requant into &lt;conv&gt;" in page
    assert "Balanced fusion" not in render(Result.model_validate({"headline": "map"}), Log([]))
