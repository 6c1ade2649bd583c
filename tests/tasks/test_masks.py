from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewbits.errors import DataError
from fewbits.tasks import mask_files
from fewbits.tasks.mask_files import PairReader, pair_files
from fewbits.tasks.masks import IGNORE, MaskFormat, read_palette


def save(path: Path, pixels: object, dtype: type = np.uint8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(pixels, dtype=dtype)).save(path)
    return path


def folder(tmp_path: Path, names: tuple[str, ...] = ("a", "b", "c")) -> Path:
    for value, name in enumerate(names):
        save(tmp_path / "images" / f"{name}.png", np.full((4, 6, 3), 10 * value))
        save(tmp_path / "masks" / f"{name}.png", np.full((4, 6), value % 2))
    return tmp_path


def test_a_mask_of_indices_keeps_them_and_knows_what_to_ignore(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", [[0, 1], [2, 11]])
    mask = MaskFormat(3, ignore=11).read(path)
    assert mask.dtype == torch.uint8 and mask.tolist() == [[0, 1], [2, IGNORE]]


def test_a_png_with_a_palette_of_its_own_is_read_by_index(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 77])
    image.save(tmp_path / "m.png")
    assert MaskFormat(3).read(tmp_path / "m.png").tolist() == [[0, 1], [2, 1]]


def test_instances_become_one_class(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", [[0, 1], [300, 65535]], np.uint16)
    assert MaskFormat(2, instances=True).read(path).tolist() == [[0, 1], [1, 1]]


def test_colours_are_read_by_their_palette(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("128 0 0 wall\n\n0,128,0, tall tree\n0 0 0 void\n")
    palette, names = read_palette(tmp_path / "p.txt", ignore="void")
    assert names == ("wall", "tall tree")
    path = save(tmp_path / "m.png", [[[128, 0, 0], [0, 128, 0]], [[0, 0, 0], [128, 0, 0]]])
    form = MaskFormat(2, palette=palette)
    assert form.read(path).tolist() == [[0, 1], [IGNORE, 0]]
    save(path, [[[128, 0, 0], [1, 128, 0]]])
    with pytest.raises(
        DataError, match=r"m\.png.*colour \(1, 128, 0\) in row 0, column 1, which is not in the palette"
    ):
        form.read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 x wall", "line 1: expected 'R G B NAME'"),
        ("1 2 256 wall", "line 1: expected"),
        ("1 2 3 a\n1 2 3 b", r"line 2: the colour \(1, 2, 3\) is there twice"),
        ("1 2 3 a\n4 5 6 b", "has no class 'void' to ignore"),
    ],
)
def test_a_palette_that_says_something_else_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_palette(tmp_path / "p.txt", ignore="void")


def test_labels_out_of_range_are_named_with_file_and_place(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", [[0, 1], [7, 1]])
    with pytest.raises(DataError, match=r"m\.png' has the label 7 in row 1, column 0; there are 3 classes, 0\.\.2"):
        MaskFormat(3).read(path)
    save(path, np.zeros((2, 2, 3)))
    with pytest.raises(DataError, match=r"in colours \(mode RGB\); expected one number a pixel"):
        MaskFormat(3).read(path)


def test_images_and_masks_are_paired_by_name(tmp_path: Path) -> None:
    root = folder(tmp_path)
    pairs = pair_files(root, "images", "masks/{stem}.png")
    assert [(i.stem, m.parent.name, m.stem) for i, m in pairs] == [(n, "masks", n) for n in "abc"]
    (tmp_path / "train.txt").write_text("c\na.png\n\n")
    assert [i.stem for i, _ in pair_files(root, "images", "masks/{stem}.png", tmp_path / "train.txt")] == ["c", "a"]


def test_what_does_not_belong_together_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (tmp_path / "list.txt").write_text("a\nz\n")
    with pytest.raises(DataError, match=r"list\.txt' lists 'z', which is not in"):
        pair_files(root, "images", "masks/{stem}.png", tmp_path / "list.txt")
    with pytest.raises(DataError, match=r"'.*\{splt\}/a\.png' of 'a\.png' is missing, and \d more; .*correct masks="):
        pair_files(root, "images", "masks/{splt}/{stem}.png")
    with pytest.raises(DataError, match="there is no image in .*nothing"):
        pair_files(root, "nothing", "masks/{stem}.png")
    save(tmp_path / "masks/b.png", np.zeros((6, 4)))
    with pytest.raises(DataError, match=r"b\.png' is 4x6 pixels, its image 'b\.png' 6x4"):
        pair_files(root, "images", "masks/{stem}.png")
    (tmp_path / "masks/b.png").unlink()
    with pytest.raises(DataError, match=r"masks/b\.png' of 'b\.png' is missing; add it"):
        pair_files(root, "images", "masks/{stem}.png")


def test_files_that_do_not_decode_are_named(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (tmp_path / "images/a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot decode the image .*a\.png"):
        pair_files(root, "images", "masks/{stem}.png")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    whole = save(tmp_path / "images/a.png", pixels).read_bytes()
    save(tmp_path / "masks/a.png", np.zeros((64, 64)))
    (tmp_path / "images/a.png").write_bytes(whole[: len(whole) // 2])  # the header is whole: only reading tells
    (first, *_) = pair_files(root, "images", "masks/{stem}.png")
    with pytest.raises(DataError, match=r"cannot decode the image .*a\.png"):
        PairReader(MaskFormat(2)).read(first)


def test_pairs_are_decoded_once_while_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = pair_files(folder(tmp_path), "images", "masks/{stem}.png")
    monkeypatch.setattr(mask_files, "KEPT_BYTES", 4 * 6 * 4 + 1)  # the first two, as the second begins below it
    reader = PairReader(MaskFormat(2))
    reader.fill(pairs)
    for image, mask in pairs:
        image.unlink(), mask.unlink()
    assert [int(reader.read(p)[0].max()) for p in pairs[:2]] == [0, 10]
    with pytest.raises(DataError, match=r"c\.png"):
        reader.read(pairs[2])
