from __future__ import annotations

import pytest
import torch

from fewbits.errors import DataError
from fewbits.tasks.scenes import CONTRAST, digit_crops, make_scenes


def test_boxes_are_tight_around_the_mask_and_do_not_overlap() -> None:
    for scene in make_scenes("train", 12, size=96, objects=(2, 5)):
        assert scene.image.shape == (3, 96, 96) and scene.image.dtype == torch.uint8
        assert scene.mask.shape == (96, 96) and scene.mask.dtype == torch.int64
        assert len(scene.boxes) == len(scene.labels) >= 1
        covered = torch.zeros(96, 96, dtype=torch.bool)
        for (left, top, right, low), label in zip(scene.boxes.int().tolist(), scene.labels.tolist()):
            inside = scene.mask[top:low, left:right] == label + 1
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            assert not covered[top:low, left:right].any()
            covered[top:low, left:right] = True
        assert (scene.mask[~covered] == 0).all()


def test_a_scene_depends_on_seed_split_and_index_only() -> None:
    few, many = make_scenes("train", 2, seed=3), make_scenes("train", 4, seed=3)
    assert all(torch.equal(a.image, b.image) and torch.equal(a.boxes, b.boxes) for a, b in zip(few, many))
    assert not torch.equal(few[0].image, few[1].image)
    assert not torch.equal(few[0].image, make_scenes("train", 1, seed=4)[0].image)
    assert not torch.equal(few[0].image, make_scenes("test", 1, seed=3)[0].image)


def test_no_digit_is_in_both_splits() -> None:
    train, test = digit_crops("train")[0].flatten(1), digit_crops("test")[0].flatten(1)
    assert len(train) + len(test) == 1797
    assert torch.cdist(test, train).min() > 0


def test_ink_stands_out_from_the_ground() -> None:
    for scene in make_scenes("test", 8):
        for box in scene.boxes.int().tolist():
            part = (slice(None), slice(box[1], box[3]), slice(box[0], box[2]))
            ink = scene.mask[part[1:]] > 0
            levels = scene.image[part].float().mean(0)
            assert abs(levels[ink].mean() - levels[~ink].mean()) > CONTRAST / 3


@pytest.mark.parametrize(
    "wrong", [{"split": "val"}, {"count": 0}, {"count": "a"}, {"size": 48.5}, {"size": 8}, {"objects": (0, 3)}]
)
def test_wrong_numbers_are_told(wrong: dict) -> None:
    with pytest.raises(DataError, match="scenes"):
        make_scenes(**{"split": "train", "count": 1} | wrong)
