from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewbits.errors import DataError
from fewbits.tasks.readers import read_cifar_binary, read_mosaics, read_zip


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_zip_is_read_sorted_by_name(tmp_path, mode, channels, png, write_zip):
    path = write_zip(tmp_path / "a.zip", {"1/b.png": png(30), "0/": b"", "1/a.png": png(20), "0/c.png": png(10)})
    images, labels = read_zip(path, int, mode)
    assert images.shape == (3, channels, 4, 6) and images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [10, 20, 30] and labels.tolist() == [0, 1, 1]


def test_zip_with_an_undecodable_image(tmp_path, png, write_zip):
    noise = png(np.random.default_rng(0).integers(0, 256, (64, 64, 3)), (64, 64))
    path = write_zip(tmp_path / "a.zip", {"0/a.png": png(1), "1/bad.png": noise[: len(noise) // 2]})
    with pytest.raises(DataError, match=r"cannot decode the image '.*a\.zip/1/bad\.png'"):
        read_zip(path, int, "RGB")


def test_zip_with_images_of_two_sizes(tmp_path, png, write_zip):
    path = write_zip(tmp_path / "a.zip", {"0/a.png": png(1), "1/b.png": png(2, (5, 6))})
    with pytest.raises(DataError, match=r"1/b\.png is \(5, 6, 3\), but 0/a\.png is \(4, 6, 3\)"):
        read_zip(path, int, "RGB")


def test_empty_zip(tmp_path, write_zip):
    with pytest.raises(DataError, match="is empty"):
        read_zip(write_zip(tmp_path / "a.zip", {}), int, "RGB")


def test_no_zip(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"cannot read the zip '.*a\.zip'"):
        read_zip(tmp_path / "a.zip", int, "RGB")


def test_cifar_binary_round_trip(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3072), dtype=np.uint8)
    labels = np.array([[3], [1], [4], [1], [9]], dtype=np.uint8)
    records = np.concatenate([labels, pixels], axis=1)
    records[:2].tofile(tmp_path / "1.bin")
    records[2:].tofile(tmp_path / "2.bin")
    images, read = read_cifar_binary([tmp_path / "1.bin", tmp_path / "2.bin"])
    assert read.tolist() == [3, 1, 4, 1, 9]
    assert np.array_equal(images.numpy(), pixels.reshape(5, 3, 32, 32))


def test_truncated_cifar_binary(tmp_path):
    (tmp_path / "1.bin").write_bytes(bytes(3072))
    with pytest.raises(DataError, match="3072 bytes, no multiple of 3073"):
        read_cifar_binary([tmp_path / "1.bin"])


def test_missing_cifar_binary(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        read_cifar_binary([tmp_path / "1.bin"])


def write_mosaic(folder: Path, k: int, images: np.ndarray, labels: str) -> None:
    Image.fromarray(images.reshape(len(images), 1024, 3)).save(folder / f"cifar10_batch_{k}.png")
    (folder / f"labels_batch_{k}.csv").write_text(labels)


def test_mosaics_round_trip(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    write_mosaic(tmp_path, 0, pixels[:2], "row,label,class\n1,9,truck\n0,6,frog\n")
    write_mosaic(tmp_path, 1, pixels[2:], "row,label,class\n0,2,bird\n")
    images, labels = read_mosaics(tmp_path)
    assert labels.tolist() == [6, 9, 2]
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels)


@pytest.mark.parametrize("labels", ["row,label\n0,1\n", "row,label\n0,1\n1,x\n", "a,b\n0,1\n1,1\n"])
def test_mosaic_with_bad_labels(tmp_path, labels):
    write_mosaic(tmp_path, 0, np.zeros((2, 32, 32, 3), dtype=np.uint8), labels)
    with pytest.raises(DataError, match=r"labels_batch_0\.csv' lacks an integer row,label"):
        read_mosaics(tmp_path)


def test_mosaic_of_another_width(tmp_path):
    Image.fromarray(np.zeros((2, 100, 3), dtype=np.uint8)).save(tmp_path / "cifar10_batch_0.png")
    with pytest.raises(DataError, match="100 pixels wide, expected 1024"):
        read_mosaics(tmp_path)


def test_folder_without_mosaics(tmp_path):
    with pytest.raises(DataError, match="holds no cifar10_batch"):
        read_mosaics(tmp_path)
