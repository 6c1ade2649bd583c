"""Where classification data comes from: one function a source, in one registry.

Nothing is downloaded. A source without a path looks in ``../shared/data`` beside the checkout.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from fewbits.errors import DataError, RecipeError, nearest
from fewbits.tasks import grouped
from fewbits.tasks.data import ImageExamples, LabelledImages, shared_data_dir
from fewbits.tasks.folder import FolderExamples, list_images
from fewbits.tasks.grouped import with_minority
from fewbits.tasks.readers import read_cifar_binary, read_mosaics, read_zip

Split = Literal["train", "test"]
Source = Callable[..., LabelledImages]  # (path, split, *, options of its own)

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
# ImageNet's statistics, for CIFAR-10 too: the public CIFAR ResNets were trained with them.
IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# Statistics of the training pixels, in 0..1.
FASHION: dict[str, Any] = {"mean": (0.286,), "std": (0.353,)}
DIGITS: dict[str, Any] = {"mean": (0.305,), "std": (0.376,)}
SUPPLIED = ("images", "files", "labels", "classes", "groups", "group_names")


def load(name: str, path: str | Path | None = None, split: Split = "train", **options: Any) -> LabelledImages:
    """Load one split of a data source.

    name: a key of ``SOURCES``. path: its folder; None where the source is embedded or shared. options: the
    source's own, and fields of what is returned: mean, std, flip, and crop_padding (in memory) or size, resize,
    min_crop_area, workers (imagefolder). Raises RecipeError for an unknown name, split or option, DataError for
    unusable data.
    """
    if name not in SOURCES:
        raise RecipeError(f"unknown data source {name!r}{nearest(name, SOURCES)}; known: {sorted(SOURCES)}")
    if split not in ("train", "test"):
        raise RecipeError(f"split must be 'train' or 'test', got {split!r}")
    source, options = SOURCES[name], dict(options)
    own = [p.name for p in inspect.signature(source).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    examples = source(None if path is None else Path(path), split, **{k: options.pop(k) for k in own if k in options})
    if examples.labels.min() == examples.labels.max():
        only = examples.classes[int(examples.labels[0])]
        raise DataError(f"the {split} split of {name!r} ({path}) holds only the class {only!r}; need at least two")
    known = own + [f.name for f in dataclasses.fields(examples) if f.name not in SUPPLIED]
    for option in options:
        if option not in known:
            raise RecipeError(f"{name!r} has no option {option!r}{nearest(option, known)}; known: {known}")
    return dataclasses.replace(examples, **options)


def digits(path: Path | None, split: Split) -> ImageExamples:
    """Handwritten digits, 1,797 images of 1x8x8, inside scikit-learn; a fixed stratified 80/20 split."""
    from sklearn.datasets import load_digits

    if path is not None:
        raise DataError(f"'digits' comes with scikit-learn and reads no files, got path={str(path)!r}; leave it out")
    data = load_digits()
    images = torch.from_numpy(data.images / 16 * 255).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(data.target).to(torch.int64)
    classes = tuple(str(c) for c in range(10))
    train, test = ImageExamples(images=images, labels=labels, classes=classes, **DIGITS).split(0.8, seed=0)
    return test if split == "test" else dataclasses.replace(train, crop_padding=1)


def cifar10(path: Path | None, split: Split) -> ImageExamples:
    """CIFAR-10, 3x32x32: the official Python or binary batches, or a zip of images a split."""
    folder = data_folder(path, "cifar10_jpeg")
    batches = [f"data_batch_{k}" for k in range(1, 6)] if split == "train" else ["test_batch"]
    for base in (folder, folder / "cifar-10-batches-bin", folder / "cifar-10-batches-py"):
        if (base / f"{batches[0]}.bin").is_file():
            images, labels = read_cifar_binary([base / f"{name}.bin" for name in batches])
            break
        if (base / batches[0]).is_file():
            images, labels = _torchvision("CIFAR10", base.parent, split)
            break
    else:
        images, labels = read_zip(_split_zip(folder, split), _index_in(CIFAR10_CLASSES), "RGB")
    return _train_augmented(split, images=images, labels=labels, classes=CIFAR10_CLASSES, **IMAGENET)


def cifar10_lossless(path: Path | None, split: Split) -> ImageExamples:
    """Lossless CIFAR-10 training images, for calibration: PNG mosaics with CSV labels. No test split."""
    if split == "test":
        raise DataError("'cifar10_lossless' holds training images only; measure accuracy on 'cifar10'")
    images, labels = read_mosaics(data_folder(path, "cifar10_lossless_train"))
    return _train_augmented(split, images=images, labels=labels, classes=CIFAR10_CLASSES, **IMAGENET)


def fashion_mnist(path: Path | None, split: Split) -> ImageExamples:
    """Fashion-MNIST, 1x28x28: torchvision's folder of idx files, or a zip of images a split."""
    folder = data_folder(path, "fashion_mnist")
    for root in (folder, folder.parent):
        if (root / "FashionMNIST" / "raw").is_dir():
            images, labels = _torchvision("FashionMNIST", root, split)
            break
    else:
        images, labels = read_zip(_split_zip(folder, split), _class_number, "L")
    return _train_augmented(split, images=images, labels=labels, classes=FASHION_CLASSES, **FASHION)


def imagefolder(path: Path | None, split: Split) -> FolderExamples:
    """Any ``train|val|test/<class>/<image>`` tree, read lazily; the classes are those of train/."""
    if path is None:
        raise DataError("'imagefolder' needs path=, a folder with train/ and val/ or test/")
    folder = data_folder(path, "")
    known = {name: folder / name for name in ("train", "test", "val") if (folder / name).is_dir()}
    wanted = [known[name] for name in (("train",) if split == "train" else ("test", "val")) if name in known]
    if not wanted:
        raise DataError(f"{str(folder)!r} has no {'train/' if split == 'train' else 'test/ or val/'} folder")
    classes = list_images(known["train"])[2] if "train" in known else None
    files, labels, classes = list_images(wanted[0], classes)
    return FolderExamples(files=files, labels=labels, classes=classes, **IMAGENET)


def digits_groups(
    path: Path | None, split: Split, *, harm: str = "contrast", strength: float = 0.7, share: float = 0.1
) -> ImageExamples:
    """Handwritten digits with a minority whose images are harder to read; see ``with_minority``."""
    return with_minority(digits(path, split), harm, strength, share)


def cifar10_groups(
    path: Path | None, split: Split, *, harm: str = "contrast", strength: float = 0.7, share: float = 0.1
) -> ImageExamples:
    """CIFAR-10 with a minority whose images are harder to read; see ``with_minority``."""
    return with_minority(cifar10(path, split), harm, strength, share)


def isic2017(
    path: Path | None, split: Split, *, group: Any = "sex", size: int = 64, unknown: str = "drop"
) -> ImageExamples:
    """Skin lesions of ISIC 2017 in three classes; groups by sex, age, or both: see ``grouped.isic2017``."""
    return grouped.isic2017(data_folder(path, "isic2017"), split, _names(group), size, unknown)


def nih_cxr64(
    path: Path | None, split: Split, *, group: Any = "sex", size: int = 64, unknown: str = "drop"
) -> ImageExamples:
    """Chest x-rays, normal or abnormal; groups by sex, age or view: see ``grouped.nih_cxr64``."""
    return grouped.nih_cxr64(data_folder(path, "nih_cxr64"), split, _names(group), size, unknown)


def manifest(
    path: Path | None,
    split: Split,
    *,
    file: str = "manifest.csv",
    group: Any = "group",
    label: str = "label",
    labels: Sequence[str] | None = None,
    size: int = 224,
    unknown: str = "drop",
) -> ImageExamples:
    """Images of a folder of your own, as a CSV manifest in it says (``read_manifest``). labels: the classes."""
    if path is None:
        raise DataError("'manifest' needs path=, the folder of the images, with manifest.csv or another file= in it")
    return grouped.manifest_images(data_folder(path, ""), split, _names(group), size, unknown, file, label, labels)


def _names(group: Any) -> Sequence[str]:
    """Return the names of group columns, of which one may come as text."""
    names = [group] if isinstance(group, str) else list(group)
    if not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"group is a column or a list of columns, got {group!r}")
    return names


SOURCES: dict[str, Source] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar10_lossless": cifar10_lossless,
    "fashion_mnist": fashion_mnist,
    "imagefolder": imagefolder,
    "digits_groups": digits_groups,
    "cifar10_groups": cifar10_groups,
    "isic2017": isic2017,
    "nih_cxr64": nih_cxr64,
    "manifest": manifest,
}


def _train_augmented(split: Split, **fields: Any) -> ImageExamples:
    """Build the examples with the field's usual augmentation: pad 4, crop, flip; on training data only."""
    return ImageExamples(**fields, crop_padding=4 if split == "train" else 0, flip=split == "train")


def data_folder(path: Path | None, shared_name: str) -> Path:
    """Return the folder to read. Raises DataError where it is missing or empty."""
    if path is None:
        shared = shared_data_dir()
        if shared is None:
            raise DataError("no path was given, and there is no ../shared/data beside the checkout; pass path=")
        path = shared / shared_name
    if not path.is_dir():
        raise DataError(f"the data folder {str(path)!r} does not exist or is no folder; correct path=")
    if not any(path.iterdir()):
        raise DataError(f"the data folder {str(path)!r} is empty; put the data there or correct path=")
    return path


def _split_zip(folder: Path, split: Split) -> Path:
    found = sorted(folder.glob(f"{split}*.zip"))
    if len(found) != 1:
        names = [f.name for f in found] or "none"
        raise DataError(f"expected the official files or one {split}*.zip in {str(folder)!r}; zips found: {names}")
    return found[0]


def _index_in(classes: tuple[str, ...]) -> Callable[[str], int]:
    def label_of(name: str) -> int:
        if name not in classes:
            raise DataError(f"class folder {name!r} is not among {list(classes)}{nearest(name, classes)}")
        return classes.index(name)

    return label_of


def _class_number(name: str) -> int:
    if not name.isdecimal():
        raise DataError(f"class folder {name!r} is no label; expected 0..9")
    return int(name)


def _torchvision(dataset: str, root: Path, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a torchvision data set: uint8 [N, C, H, W] and int64 [N]."""
    from torchvision import datasets

    try:
        read = getattr(datasets, dataset)(str(root), train=split == "train", download=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"torchvision cannot read {dataset} in {str(root)!r}: {error}") from error
    images = torch.as_tensor(read.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(read.targets, dtype=torch.int64)
