from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fewbits.errors import DataError, RecipeError
from fewbits.tasks import sources
from fewbits.tasks.sources import CIFAR10_CLASSES, FASHION_CLASSES, load


def test_digits_are_split_once_and_for_all():
    train, test = load("digits"), load("digits", split="test")
    assert (len(train), len(test)) == (1438, 359) and train.shape == test.shape == (1, 8, 8)
    assert torch.bincount(test.labels).min() >= 34
    assert torch.equal(test.images, load("digits", split="test").images)
    images, labels = load_digits(return_X_y=True)
    everything = np.column_stack([labels, (images / 16 * 255).round()])
    parts = np.concatenate([np.column_stack([e.labels, e.images.flatten(1)]) for e in (train, test)])
    assert sorted(map(tuple, everything)) == sorted(map(tuple, parts))


def test_digits_keep_all_their_grey_levels():
    assert load("digits").images.unique().numel() == 17


def test_statistics_of_the_digits_are_those_of_the_constants():
    images = load("digits").batches(2000)
    pixels = next(iter(images))[0]
    assert abs(pixels.mean()) < 0.01 and abs(pixels.std() - 1) < 0.01


def test_options_replace_fields():
    plain = load("digits", mean=[0.0], std=[1.0], crop_padding=3)
    assert plain.crop_padding == 3
    assert torch.equal(plain.gather([5])[0], plain.images[5:6].float() / 255)


@pytest.fixture
def cifar_zip(tmp_path: Path, png, write_zip) -> Path:
    write_zip(tmp_path / "train_4.zip", {f"{c}/{k}.png": png(k) for c in ("cat", "truck") for k in range(2)})
    write_zip(tmp_path / "test_2.zip", {f"{c}/0.png": png(7) for c in ("cat", "truck")})
    return tmp_path


def test_cifar10_from_zips(cifar_zip):
    train, test = load("cifar10", cifar_zip), load("cifar10", cifar_zip, "test")
    assert train.labels.tolist() == [3, 3, 9, 9] and test.labels.tolist() == [3, 9]
    assert train.classes == CIFAR10_CLASSES
    assert (train.crop_padding, train.flip, test.crop_padding, test.flip) == (4, True, 0, False)


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_cifar10_from_the_official_binary_batches(tmp_path, below):
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    for k, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"]):
        (folder / f"{name}.bin").write_bytes(bytes([k]) + bytes([k]) * 3072)
    (folder / "test_batch.bin").write_bytes((bytes([7]) + bytes(3072)) + (bytes([8]) + bytes(3072)))
    assert load("cifar10", tmp_path).labels.tolist() == [0, 1, 2, 3, 4]
    assert load("cifar10", tmp_path).images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert load("cifar10", tmp_path, "test").labels.tolist() == [7, 8]


@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_cifar10_from_the_official_python_batches(tmp_path, monkeypatch, below):
    import pickle

    from torchvision.datasets import CIFAR10

    # A made-up batch cannot have the official checksum, which torchvision tests before it unpickles.
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.arange(3072, dtype=np.uint16).astype(np.uint8)[None].repeat(2, 0)
    for name in ["test_batch", *(f"data_batch_{k}" for k in range(1, 6))]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [2, 5]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10_CLASSES)}))
    train, test = load("cifar10", tmp_path / below), load("cifar10", tmp_path / below, "test")
    assert train.labels.tolist() == [2, 5] * 5 and test.labels.tolist() == [2, 5]
    assert np.array_equal(test.images[1].numpy().ravel(), pixels[1])


def test_damaged_python_batches_are_not_unpickled(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"anything")
    with pytest.raises(DataError, match="torchvision cannot read CIFAR10"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("below", ["", "FashionMNIST"])
def test_fashion_mnist_from_idx_files(tmp_path, below):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 3), ("t10k", 2)):
        header = struct.pack(">iiii", 0x803, count, 28, 28)
        pixels = bytes(k for k in range(count) for _ in range(784))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels)
        labels = struct.pack(">ii", 0x801, count) + bytes(range(4, 4 + count))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    test = load("fashion_mnist", tmp_path / below, "test")
    assert test.images.shape == (2, 1, 28, 28) and test.images[:, 0, 3, 3].tolist() == [0, 1]
    assert test.labels.tolist() == [4, 5] and test.classes == FASHION_CLASSES
    assert len(load("fashion_mnist", tmp_path / below)) == 3


def test_label_outside_range_names_value_and_index(tmp_path, png, write_zip):
    write_zip(tmp_path / "train.zip", {"3/a.png": png(1), "12/a.png": png(2)})
    with pytest.raises(DataError, match=r"label 12 of example 0 is outside 0\.\.9"):
        load("fashion_mnist", tmp_path)


def test_class_folder_that_is_no_label(tmp_path, png, write_zip):
    write_zip(tmp_path / "train.zip", {"boots/a.png": png(1)})
    with pytest.raises(DataError, match="class folder 'boots' is no label"):
        load("fashion_mnist", tmp_path)


def test_unknown_class_folder_lists_near_names(tmp_path, png, write_zip):
    write_zip(tmp_path / "train.zip", {"hors/a.png": png(1)})
    with pytest.raises(DataError, match=r"'hors' is not among .* did you mean 'horse'"):
        load("cifar10", tmp_path)


def test_one_class_only(tmp_path, png, write_zip):
    write_zip(tmp_path / "train.zip", {"cat/a.png": png(1), "cat/b.png": png(1)})
    with pytest.raises(DataError, match="holds only the class 'cat'"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar10_lossless", "fashion_mnist", "imagefolder"])
def test_missing_and_empty_folders(tmp_path, name):
    with pytest.raises(DataError, match="does not exist"):
        load(name, tmp_path / "nowhere")
    with pytest.raises(DataError, match="is empty"):
        load(name, tmp_path)


def test_folder_with_two_zips_of_a_split(cifar_zip, write_zip):
    write_zip(cifar_zip / "train_5.zip", {})
    with pytest.raises(DataError, match=r"one train\*\.zip .*\['train_4.zip', 'train_5.zip'\]"):
        load("cifar10", cifar_zip)


def test_no_path_and_no_shared_data(monkeypatch):
    monkeypatch.setattr(sources, "shared_data_dir", lambda: None)
    with pytest.raises(DataError, match="pass path="):
        load("cifar10")


def test_imagefolder_needs_a_path():
    with pytest.raises(DataError, match="needs path="):
        load("imagefolder")


def test_digits_read_no_path(tmp_path):
    with pytest.raises(DataError, match="reads no files"):
        load("digits", tmp_path)


def test_lossless_has_no_test_split():
    with pytest.raises(DataError, match="training images only"):
        load("cifar10_lossless", split="test")


def test_unknown_name_split_and_option():
    with pytest.raises(RecipeError, match="'digts'; did you mean 'digits'"):
        load("digts")
    with pytest.raises(RecipeError, match="split must be 'train' or 'test', got 'valid'"):
        load("digits", split="valid")
    with pytest.raises(RecipeError, match="no option 'crop_pading'; did you mean 'crop_padding'"):
        load("digits", crop_pading=1)
    with pytest.raises(RecipeError, match="no option 'labels'"):
        load("digits", labels=torch.zeros(1))


def test_shared_folders_load(shared):
    test = load("cifar10", split="test")
    assert torch.bincount(test.labels).tolist() == [200] * 10 and test.shape == (3, 32, 32)
    lossless = load("cifar10_lossless")
    assert len(lossless) == 3000 and lossless.labels[:2].tolist() == [6, 9]
    fashion = load("fashion_mnist", split="test")
    assert torch.bincount(fashion.labels).tolist() == [500] * 10 and fashion.shape == (1, 28, 28)
