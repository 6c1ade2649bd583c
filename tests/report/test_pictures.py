from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewbits.errors import DataError
from fewbits.report import write_report
from fewbits.report.pictures import MOST_SIDE, class_colours, colours, heat_map, hex_colour, photo, shade


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_a_mask_keeps_its_classes_and_an_image_its_looks() -> None:
    mask = np.random.default_rng(0).integers(0, 11, (20, 30))
    palette = class_colours(11)
    seen = np.array(decoded(colours(mask, palette)).convert("RGB"))
    assert np.array_equal(seen, np.array(palette)[mask])
    image = np.full((40, 900, 3), (200, 30, 90), np.uint8)
    small = decoded(photo(image))
    assert small.size == (MOST_SIDE, 14) and abs(np.array(small).astype(int) - image[0, 0]).max() < 6
    assert decoded(colours(np.zeros((10, 2 * MOST_SIDE), int), palette)).size == (MOST_SIDE, 5)


def test_colours_of_classes_differ() -> None:
    found = class_colours(40)
    assert len(set(found)) == 40 and found[0] == min(found, key=sum)
    assert hex_colour((255, 0, 171)) == "#ff00ab"


def test_a_heat_map_is_blue_below_zero_and_red_above() -> None:
    seen = np.array(decoded(heat_map(np.array([[1.0, 0.0, 0.3], [-1.0, 1.7, -0.3]]))).convert("RGB")).astype(int)
    assert seen.shape == (212, 318, 3)
    cells = seen[53::106, 53::106]
    assert np.array_equal(cells[0, 0], shade(1.0)) and np.array_equal(cells[0, 0], cells[1, 1]), "beyond 1 is as 1"
    assert np.array_equal(cells[1, 0], shade(-1.0)) and len(set(cells[0, 1])) == 1
    assert cells[0, 2, 0] > cells[0, 2, 2] and cells[1, 2, 0] < cells[1, 2, 2]
    assert np.array_equal(cells[0, 2], shade(0.3)) and shade(0.3) != shade(1.0)


def test_pictures_are_on_the_page_and_nothing_else_may_be(tmp_path: Path) -> None:
    uri = photo(np.zeros((8, 8, 3), np.uint8))
    row = {
        "tiles": [{"caption": "float <b>", "image": uri}, {"caption": "quantized", "image": uri}],
        "legend": [{"name": "car", "colour": "#ff00ab"}],
    }
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"pictures": [row]}))
    page = write_report(tmp_path).read_text()
    assert page.count(f'<img src="{uri}"') == 2 and "float &lt;b&gt;" in page and "--c:#ff00ab" in page
    for tile, colour in (("http://elsewhere/x.png", "#ff00ab"), (uri + '"', "#ff00ab"), (uri, "red")):
        bad = {"tiles": [{"caption": "", "image": tile}], "legend": [{"name": "car", "colour": colour}]}
        path.write_text(json.dumps({"pictures": [bad]}))
        with pytest.raises(DataError, match=r"pictures\.0"):
            write_report(tmp_path)
    path.write_text("{}")
    assert 'id="pictures"' not in write_report(tmp_path).read_text()
