from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewbits.errors import DataError, RecipeError
from fewbits.tasks.masks import IGNORE
from fewbits.tasks.segmentation_sources import CAMVID, load_segmentation


def save(path: Path, pixels: object, dtype: type = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(pixels, dtype=dtype)).save(path)


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    """A folder as CamVid's: eleven classes, 11 for none; the value of an image tells which it is."""
    for split, count in (("train", 5), ("test", 3)):
        for i in range(count):
            save(tmp_path / split / f"{split}{i}.png", np.full((24, 32, 3), 20 * i))
            save(tmp_path / f"{split}annot" / f"{split}{i}.png", np.arange(24 * 32).reshape(24, 32) % 12)
    return tmp_path


def test_folders_with_splits(camvid: Path) -> None:
    train, test = load_segmentation("camvid", camvid, {"size": [24, 32], "colour": 0.2})
    assert len(train) == 5 and len(test) == 3 and train.classes == CAMVID and train.colour == 0.2
    images, masks = test.gather(range(3))
    assert images.shape == (3, 3, 24, 32) and masks.unique().tolist() == [*range(11), IGNORE]
    few, _ = load_segmentation("camvid", camvid, {"size": [24, 32]}, {"train": 2})
    assert len(few) == 2


def test_a_folder_of_ones_own_with_colours_and_lists(camvid: Path) -> None:
    (camvid / "palette.txt").write_text("0 0 0 floor\n255 0 0 thing\n9 9 9 void\n")
    colours = np.array([[0, 0, 0], [255, 0, 0], [9, 9, 9]])
    for i in range(5):
        save(camvid / "colours" / f"train{i}.png", colours[np.arange(24 * 32).reshape(24, 32) % 3])
    (camvid / "learn.txt").write_text("train3\ntrain1\n")
    (camvid / "check.txt").write_text("train0\n")
    options = {"images": "train", "masks": "colours/{stem}.png", "palette": "palette.txt", "ignore": "void"}
    lists = {"names": "{split}.txt", "train": "learn", "test": "check"}
    train, test = load_segmentation("masks", camvid, options | lists)
    assert train.classes == ("floor", "thing") and train.size == (24, 32), "the size of the first image"
    levels = train.gather([0, 1])[0][:, 0, 0, 0] * 0.229 + 0.485
    assert torch.allclose(levels * 255, torch.tensor([60.0, 20.0]), atol=0.01) and len(test) == 1
    assert train.gather([0])[1].unique().tolist() == [0, 1, IGNORE]


def test_without_splits_a_share_is_for_testing(tmp_path: Path) -> None:
    for i in range(8):
        save(tmp_path / "images" / f"{i}.png", np.full((16, 16, 3), 30 * i))
        save(tmp_path / "instance_masks" / f"{i}.png", np.arange(256).reshape(16, 16) * (i > 0), np.uint16)
    train, test = load_segmentation("nuclei", tmp_path, {"size": [16, 16]})
    assert (len(train), len(test)) == (6, 2) and train.classes == ("ground", "nucleus") and train.ground == 0
    levels = [float(s.gather([i])[0][0, 0, 0, 0]) for s in (train, test) for i in range(len(s))]
    assert len(set(levels)) == 8
    again = load_segmentation("nuclei", tmp_path, {"size": [16, 16]}, seed=7)
    assert torch.equal(again[1].gather([0, 1])[0], test.gather([0, 1])[0]), "the split does not move with the seed"
    with pytest.raises(DataError, match="one side empty"):
        load_segmentation("nuclei", tmp_path, {"test_share": 0.01})


def test_scenes_need_no_files() -> None:
    train, test = load_segmentation("scenes", None, {"train": 4, "test": 2, "side": 48}, {"test": 1})
    assert len(train) == 4 and len(test) == 1 and train.size == (48, 48) and len(train.classes) == 11
    masks = train.gather(range(4))[1]
    assert masks.max() <= 10 and (masks > 0).any(), "digits are classes 1..10"
    with pytest.raises(DataError, match="read no files"):
        load_segmentation("scenes", Path("here"))


def test_what_is_unknown_or_unfit_is_told(camvid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="unknown source 'camvit' of segmentation; did you mean 'camvid'"):
        load_segmentation("camvit")
    with pytest.raises(RecipeError, match="no option 'colours'; did you mean 'colour'"):
        load_segmentation("camvid", camvid, {"colours": 1})
    with pytest.raises(RecipeError, match="'scenes' has no option 'ignore'"):
        load_segmentation("scenes", None, {"ignore": 1})
    with pytest.raises(DataError, match="name the classes"):
        load_segmentation("masks", camvid)
    with pytest.raises(DataError, match="needs path="):
        load_segmentation("masks", None, {"classes": ["a", "b"]})
    for given, message in (
        ({"classes": "ground"}, "classes is a list of names, such as .* got 'ground'"),
        ({"classes": ["a", "a"]}, "each once"),
        ({"instances": "no"}, "instances is true or false, got 'no'"),
        ({"test_share": "a"}, "test_share .* got 'a'"),
        ({"images": 3}, "images is a name or a path, got 3"),
    ):
        with pytest.raises(DataError, match=message):
            load_segmentation("masks", camvid, {"classes": ["a", "b"], **given})
    with pytest.raises(DataError, match="ignore is a label"):
        load_segmentation("camvid", camvid, {"ignore": "void"})
    with pytest.raises(DataError, match=r"train0\.png' has the label 11 .* 11 classes"):
        load_segmentation("camvid", camvid, {"ignore": None})
    monkeypatch.setattr("fewbits.tasks.sources.shared_data_dir", lambda: None)
    with pytest.raises(DataError, match="no path was given"):
        load_segmentation("nuclei")


def test_camvid_and_nuclei_as_they_are(shared: Path) -> None:
    for name, shape, classes in (("camvid", (360, 480), 11), ("nuclei", (256, 256), 2)):
        train, test = load_segmentation(name, counts={"train": 2, "test": 2})
        images, masks = test.gather([0, 1])
        assert images.shape == (2, 3, *shape) and set(masks.unique().tolist()) <= {*range(classes), IGNORE}
        assert len(train) == 2 and len(train.classes) == classes
