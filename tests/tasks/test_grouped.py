from __future__ import annotations

import csv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewbits.errors import DataError, RecipeError
from fewbits.tasks.data import ImageExamples
from fewbits.tasks.sources import load


def picture(path: Path, value: int, mode: str = "RGB", size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * 3).save(path)
    return path


def table(folder: Path, head: str, lines: list[str], names: list[str], mode: str = "RGB") -> Path:
    """Write a table and the zip of its images, whose brightness is their number."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "all.csv").write_text("\n".join([head, *lines]))
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        for i, name in enumerate(names):
            archive.write(picture(folder.parent / "made" / name, i, mode), name)
    return folder


@pytest.mark.parametrize("harm", ["contrast", "blur", "dark"])
def test_a_minority_of_every_class_is_harder_to_read(harm: str) -> None:
    plain, found = load("digits"), load("digits_groups", harm=harm, strength=0.8, share=0.2)
    assert isinstance(plain, ImageExamples) and isinstance(found, ImageExamples)
    assert found.group_names == ("majority", "minority") and found.groups is not None
    few = found.groups == 1
    for label in range(10):
        share = float(few[found.labels == label].float().mean())
        assert share == pytest.approx(0.2, abs=0.01)
    assert torch.equal(found.images[~few], plain.images[~few])
    before, after = plain.images[few].float(), found.images[few].float()
    if harm == "dark":
        assert float(after.mean() / before.mean()) == pytest.approx(0.2, abs=0.02)
    else:
        assert float(after.mean()) == pytest.approx(float(before.mean()), rel=0.05)
        assert float(after.std((2, 3)).mean()) < 0.7 * float(before.std((2, 3)).mean())
    assert torch.equal(load("digits_groups", harm=harm, strength=0.8, share=0.2).images, found.images)  # type: ignore


def test_groups_go_with_subsets_and_splits() -> None:
    found = load("digits_groups", share=0.2)
    assert found.groups is not None
    first, rest = found.split(0.25, seed=3)
    for part in (first, rest, found.subset(200)):
        assert part.groups is not None and float((part.groups == 1).float().mean()) == pytest.approx(0.2, abs=0.02)
    assert len(first) + len(rest) == len(found)


def test_isic2017_has_three_classes_and_groups_by_sex_and_age(tmp_path: Path) -> None:
    names = [f"I{i}" for i in range(120)]
    lines = [
        f"{name},{int(i % 3 == 0)},{int(i % 3 == 1)},{('female', 'male', 'unknown')[i % 4 % 3]},{(40, 75)[i // 60]}"
        for i, name in enumerate(names)
    ]
    folder = table(tmp_path / "isic", "image_id,melanoma,seborrheic_keratosis,sex,age_approximate", lines,
                   [f"{n}.jpg" for n in names])  # fmt: skip
    train, test = (load("isic2017", folder, split, size=8) for split in ("train", "test"))
    assert train.classes == ("keratosis", "melanoma", "nevus") and train.group_names == ("female", "male")
    assert train.shape == (3, 8, 8) and len(train) + len(test) == 90 and train.mean == test.mean
    both = load("isic2017", folder, "train", group=["sex", "age"], size=8)
    assert both.group_names == ("female x 60 and over", "female x under 60", "male x 60 and over", "male x under 60")
    with pytest.raises(DataError, match=r"has the groups \['age', 'sex'\], got 'tone'"):
        load("isic2017", folder, "train", group="tone")


def test_no_patient_of_the_x_rays_is_in_both_splits(tmp_path: Path) -> None:
    names = [f"{i:03}.png" for i in range(100)]
    lines = [
        f"{n},train,{i % 2},x,{i // 2},{30 + i % 50},{'FM'[i % 3 % 2]},{('PA', 'AP')[i % 2]}"
        for i, n in enumerate(names)
    ]
    folder = table(tmp_path / "nih", "image,split,abnormal,findings,patient_id,age,sex,view", lines, names, "L")
    parts = {split: load("nih_cxr64", folder, split, size=4, group="view") for split in ("train", "test")}
    # an image's brightness is its number, and two numbers are one patient
    patients = {split: {int(v) // 2 for v in part.images[:, 0, 0, 0]} for split, part in parts.items()}  # type: ignore
    assert not patients["train"] & patients["test"] and len(patients["train"] | patients["test"]) == 50
    assert parts["train"].shape == (1, 4, 4) and parts["train"].classes == ("abnormal", "normal")


def test_a_manifest_of_your_own(tmp_path: Path) -> None:
    rows = [
        (f"images/{i}.jpg", ("cat", "dog")[i % 2], ("a", "b")[i // 2 % 2], "train" if i < 16 else "test")
        for i in range(24)
    ]
    for i, row in enumerate(rows):
        picture(tmp_path / row[0], i)
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "group", "split"), *rows])
    train = load("manifest", tmp_path, "train", size=6)
    assert len(train) == 16 and train.group_names == ("a", "b") and train.shape == (3, 6, 6)
    assert load("manifest", tmp_path, "test", size=6, labels=["dog", "cat"]).classes == ("dog", "cat")
    (tmp_path / rows[3][0]).unlink()
    with pytest.raises(DataError, match=r"manifest\.csv names 'images/3\.jpg', and there is no such image"):
        load("manifest", tmp_path, "train", size=6)
    with pytest.raises(DataError, match="needs path="):
        load("manifest")


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    lines = [f"{i}.png,train,{i % 2},x,{i},50,F,PA" for i in range(20)]
    head, names = "image,split,abnormal,findings,patient_id,age,sex,view", [f"{i}.png" for i in range(19)]
    folder = table(tmp_path / "nih", head, lines, names)
    with pytest.raises(DataError, match=r"all\.zip has no image '19\.png'"):
        for split in ("train", "test"):
            load("nih_cxr64", folder, split)
    (folder / "all.zip").unlink()
    with pytest.raises(DataError, match=r"one CSV table and one zip.*\['all\.csv'\]"):
        load("nih_cxr64", folder)
    with pytest.raises(DataError, match="a minority needs a harm of"):
        load("digits_groups", harm="noise")
    with pytest.raises(RecipeError, match=r"no option 'strenght'.*did you mean 'strength'"):
        load("digits_groups", strenght=0.5)
    with pytest.raises(DataError, match="groups .* must be one index a label"):
        images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
        ImageExamples(images=images, labels=torch.tensor([0, 1, 0]), classes=("a", "b"), mean=(0,), std=(1,),
                      groups=torch.tensor([0, 0, 1]), group_names=("one",))  # fmt: skip
    assert np.isfinite(load("digits_groups").gather([0])[0].numpy()).all()
