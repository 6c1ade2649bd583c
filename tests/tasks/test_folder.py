from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fewbits.errors import DataError
from fewbits.tasks.folder import FolderExamples, random_window
from fewbits.tasks.sources import load


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three classes in train/, two of them in val/; one colour a class, 20x30 pixels; one grey image."""
    for folder, classes in (("train", "abc"), ("val", "bc")):
        for name in classes:
            (tmp_path / folder / name).mkdir(parents=True)
            for k in range(4):
                pixels = np.full((20, 30, 3), 60 * "abc".index(name) + k, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / name / f"{k}.png")
    Image.fromarray(np.full((20, 30), 90, dtype=np.uint8)).save(tmp_path / "train" / "a" / "grey.png")
    return tmp_path


def examples(tree: Path, split: str = "train", **options: object) -> FolderExamples:
    return load("imagefolder", tree, split, size=16, mean=(0, 0, 0), std=(1, 1, 1), **options)  # type: ignore


def test_reads_lazily_in_order(tree):
    data = examples(tree)
    assert data.classes == ("a", "b", "c") and data.shape == (3, 16, 16)
    assert torch.bincount(data.labels).tolist() == [5, 4, 4]
    images, labels = data.gather([4, 5, 12])
    assert images.shape == (3, 3, 16, 16) and labels.tolist() == [0, 1, 2]
    torch.testing.assert_close(images[:, 0, 0, 0] * 255, torch.tensor([90.0, 60.0, 123.0]))


def test_labels_of_the_test_split_follow_the_classes_of_train(tree):
    test = examples(tree, "test")
    assert test.classes == ("a", "b", "c") and test.labels.unique().tolist() == [1, 2]
    torch.testing.assert_close(test.gather([0])[0][0, 0, 0, 0] * 255, torch.tensor(60.0))


def test_test_folder_comes_before_val(tree):
    for name in "ab":
        shutil.copytree(tree / "train" / name, tree / "test" / name)
    assert examples(tree, "test").labels.unique().tolist() == [0, 1]


def test_classes_of_a_tree_without_train_are_its_own(tree):
    (tree / "train").rename(tree / "other")
    assert examples(tree, "test").classes == ("b", "c")


def test_augmentation_is_a_function_of_the_generator_alone(tree):
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tree / "train" / "a" / "0.png")
    data = examples(tree)
    cut = [data.gather([0] * 8, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(cut[0], cut[1]) and not torch.equal(cut[0], cut[2])
    assert len({image.numpy().tobytes() for image in cut[0]}) > 1
    one_thread = examples(tree, workers=1).gather([0] * 8, torch.Generator().manual_seed(1))[0]
    assert torch.equal(cut[0], one_thread)


def test_evaluation_cuts_the_centre(tree):
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, 8:24] = 200
    Image.fromarray(pixels).save(tree / "train" / "a" / "0.png")
    image = examples(tree, resize=16).gather([0])[0] * 255
    torch.testing.assert_close(image, torch.full_like(image, 200))


def test_subset_keeps_files_and_labels_together(tree):
    data = examples(tree).subset(6, seed=3)
    for file, label in zip(data.files, data.labels.tolist()):
        assert Path(file).parent.name == data.classes[label]
    assert len(list(data.batches(4))) == 2


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    min_area=st.floats(0.01, 1),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4),
)
def test_random_window_lies_in_the_image(height, width, min_area, draws):
    top, left, h, w = random_window(height, width, min_area, draws)
    assert h >= 1 and w >= 1 and 0 <= top <= height - h and 0 <= left <= width - w


def test_undecodable_image_is_named(tree):
    (tree / "train" / "b" / "broken.png").write_bytes(b"no image")
    data = examples(tree)
    with pytest.raises(DataError, match=r"cannot decode the image '.*broken\.png'"):
        list(data.batches(8))


def test_class_unknown_to_train(tree):
    (tree / "val" / "c").rename(tree / "val" / "d")
    with pytest.raises(DataError, match=r"has the class 'd', which is not among \['a', 'b', 'c'\]"):
        examples(tree, "test")


def test_class_folder_without_images(tree):
    (tree / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        examples(tree)


def test_one_class_only(tree):
    for name in "bc":
        (tree / "train" / name).rename(tree / f"gone_{name}")
    with pytest.raises(DataError, match="two classes"):
        examples(tree)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 8}, "size=16, resize=8"),
        ({"min_crop_area": 0.0}, "min_crop_area"),
        ({"workers": 0}, "workers must be at least 1"),
    ],
)
def test_bad_options(tree, options, message):
    with pytest.raises(DataError, match=message):
        examples(tree, **options)


def test_missing_split_folder(tree):
    (tree / "val").rename(tree / "other")
    with pytest.raises(DataError, match="no test/ or val/ folder"):
        examples(tree, "test")
