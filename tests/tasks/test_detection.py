from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fewbits.errors import DataError
from fewbits.tasks.augment import Augmentation, window
from fewbits.tasks.detection import DetectionExamples, scene_examples
from fewbits.tasks.scenes import make_scenes
from fewbits.train import Batches

STRONG = Augmentation(mosaic=0.5, scale=(0.7, 1.4), flip="both", colour=0.3)


def examples(count: int = 8, **fields: Any) -> DetectionExamples:
    return scene_examples(make_scenes("train", count), **fields)


def test_augmentation_depends_on_seed_epoch_and_index_only() -> None:
    first, second = (Batches(examples(augmentation=STRONG), 4, seed=1) for _ in range(2))
    first.batch(0, 0), first.batch(0, 1)  # what a resumed run skips
    torch.rand(3)
    state = torch.random.get_rng_state()
    for one, other in zip(first.batch(1, 1), second.batch(1, 1)):
        assert torch.equal(one, other)
    assert torch.equal(state, torch.random.get_rng_state()), "the training's own random numbers are not touched"
    assert not torch.equal(first.batch(1, 1)[0], first.batch(2, 1)[0])


@pytest.mark.parametrize("change", [{"mosaic": 1.0}, {"scale": (0.6, 1.6)}, {"flip": "both"}, {"colour": 0.5}])
def test_boxes_move_with_what_they_surround(change: dict[str, Any]) -> None:
    """Ground is black and objects are bright, so every box must hold bright pixels up to its borders."""
    data = examples()
    images = torch.zeros_like(data.images)
    for image, objects in zip(images, data.objects):
        for left, top, right, low in objects.boxes.int().tolist():
            image[:, top:low, left:right] = 255
    data = dataclasses.replace(data, images=images, augmentation=Augmentation(**change), mean=(0,) * 3, std=(1,) * 3)
    seen = 0
    for seed in range(4):
        for image, target in zip(*data.gather(range(8), torch.Generator().manual_seed(seed))):
            covered = torch.zeros_like(image[0], dtype=torch.bool)
            for label, *corners in target.tolist():
                if label >= 0:
                    left, top, right, low = (round(c) for c in corners)
                    assert image[:, top:low, left:right].mean() > 0.35
                    covered[max(top - 2, 0) : low + 2, max(left - 2, 0) : right + 2] = True
                    seen += 1
            # what is left out is at most a rest of an object
            assert (image[0][~covered] > 0.1).float().mean() < 0.2
    assert seen > 30


def test_a_window_wider_than_the_image_holds_all_of_it() -> None:
    image, boxes = torch.full((3, 20, 20), 200, dtype=torch.uint8), torch.tensor([[0.0, 0.0, 20.0, 20.0]])
    cut, moved, labels = window((image, boxes, torch.tensor([4])), (20, 20), (0.5, 0.5))
    left, top, right, low = moved[0].tolist()
    assert right - left == low - top == 10 and labels.tolist() == [4]
    assert (cut > 100).sum() == pytest.approx(3 * 100, rel=0.25)  # its border is blurred


def test_an_object_of_which_little_is_left_is_left_out() -> None:
    image, boxes = torch.zeros(3, 40, 40, dtype=torch.uint8), torch.tensor([[0.0, 0.0, 40.0, 40.0]])
    _, moved, labels = window((image, boxes, torch.tensor([0])), (40, 40), (4.0, 4.0))  # a 16th of the box
    assert len(moved) == len(labels) == 0


def test_images_without_objects_make_batches() -> None:
    data = examples(2)
    empty = dataclasses.replace(data.objects[0], **{f: getattr(data.objects[0], f)[:0] for f in vars(data.objects[0])})
    data = dataclasses.replace(data, objects=(empty, empty), augmentation=STRONG)
    _, targets = data.gather([0, 1], torch.Generator().manual_seed(0))
    assert targets.shape == (2, 1, 5) and (targets == -1).all()


def test_split_and_subset_share_nothing_and_repeat() -> None:
    data = examples(10)
    first, second = data.split(0.3, seed=4)
    assert len(first) == 3 and sorted((*first.names, *second.names)) == sorted(data.names)
    assert data.subset(5, seed=2).names == data.subset(5, seed=2).names
    with pytest.raises(DataError, match="ask for 1 to 10"):
        data.subset(11)


def test_wrong_examples_are_told() -> None:
    data = examples(2)
    with pytest.raises(DataError, match="uint8"):
        dataclasses.replace(data, images=data.images.float())
    with pytest.raises(DataError, match=r"scene 0: label \d is outside 0..0"):
        dataclasses.replace(
            data, classes=("zero",), objects=tuple(dataclasses.replace(o, labels=o.labels + 1) for o in data.objects)
        )
    with pytest.raises(DataError, match="flip"):
        Augmentation(flip="up")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="scale"):
        Augmentation(scale=(2, 1))
