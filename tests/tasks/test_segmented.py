from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbits.errors import DataError
from fewbits.tasks.masks import IGNORE
from fewbits.tasks.segmented import SegmentedImages
from fewbits.train import Batches


def pair(seed: int, height: int = 24, width: int = 32) -> tuple[Tensor, Tensor]:
    """An image whose first channel is 40 times its mask."""
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[seed : seed + 8, 4:20] = 1 + seed % 3
    image = torch.stack([40 * mask, torch.full_like(mask, 9), torch.full_like(mask, seed)])
    return image, mask


def examples(count: int = 6, **fields: object) -> SegmentedImages:
    plain = {"size": (24, 32), "mean": (0.0,) * 3, "std": (1.0,) * 3, "classes": ("a", "b", "c", "d")}
    reads = {"reads": [lambda i=i: pair(i) for i in range(count)]}
    return SegmentedImages(**(reads | plain | fields))  # type: ignore[arg-type]


def test_without_a_generator_nothing_is_augmented() -> None:
    images, masks = examples(colour=0.5).gather([3, 0])
    assert images.dtype == torch.float32 and masks.dtype == torch.int64
    assert type(images) is Tensor and type(masks) is Tensor
    assert torch.equal(masks[1], pair(0)[1].long())
    assert torch.allclose(images[0], pair(3)[0] / 255)


def test_image_and_mask_are_scaled_together() -> None:
    images, masks = examples(size=(48, 64)).gather([2])
    assert images.shape == (1, 3, 48, 64) and masks.shape == (1, 48, 64)
    assert set(masks.unique().tolist()) == {0, 3}, "no class between two others"
    inside = (masks[0, 6:-6, 6:-6] == 3).float().mean()
    assert 0.05 < inside < 0.5


def test_augmentation_moves_image_and_mask_alike() -> None:
    data = examples(1, flip="both", min_area=0.3)
    original, seen = data.gather([0])[1], []
    for seed in range(12):
        images, masks = data.gather([0], torch.Generator().manual_seed(seed))
        assert images.shape == (1, 3, 24, 32)
        close = (images[0, 0] * 255 / 40 - masks[0]).abs() < 0.02
        assert close.float().mean() > 0.75  # not at the edges, where the image is smooth
        seen.append(masks)
    assert not all(torch.equal(m, original) for m in seen)


def test_colour_leaves_the_mask_alone() -> None:
    data = examples(1, flip="none", min_area=1.0, colour=0.5, size=(24, 24))
    found = [data.gather([0], torch.Generator().manual_seed(s)) for s in range(4)]
    assert len({float(images.mean()) for images, _ in found}) == 4


def test_a_batch_depends_on_epoch_and_index_only_and_draws_from_no_one() -> None:
    def batches() -> Batches:
        return Batches(examples(8, flip="both", colour=0.4), 2, seed=5)

    first = batches()
    all_of_them = {(e, i): first.batch(e, i) for e in range(2) for i in range(4)}
    before = torch.get_rng_state()
    again = batches().batch(1, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(again, all_of_them[1, 2]))
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(batches().batch(1, 2), again))
    assert not torch.equal(all_of_them[0, 2][0], again[0])


def test_parts_are_disjoint_and_whole() -> None:
    data = examples(6)
    first, others = data.split(0.34, seed=1)
    assert len(first) == 2 and len(others) == 4
    seeds = [int(s.gather([i])[0][0, 2].max() * 255 + 0.5) for s in (first, others) for i in range(len(s))]
    assert sorted(seeds) == list(range(6))
    assert len(data.subset(3)) == 3
    assert [len(images) for images, _ in data.batches(4)] == [4, 2]
    with pytest.raises(DataError, match="one side empty"):
        data.split(0.01)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": (24,)}, "height and width"),
        ({"crop": (4, 24)}, "crop is height and width"),
        ({"min_area": 0.0}, "min_area"),
        ({"flip": True}, "flip must be none"),
        ({"mean": (0.5,)}, "three means"),
        ({"ground": 4}, r"0\.\.3"),
        ({"reads": []}, "empty"),
        ({"size": 24}, "height and width in pixels, both at least 8, got 24"),
        ({"min_area": "a"}, "got 'a' and 0.0"),
        ({"ground": "a"}, r"0\.\.3, or null, got 'a'"),
    ],
)
def test_values_out_of_range_are_errors(fields: dict[str, object], message: str) -> None:
    plain = {"reads": [lambda: pair(0)], "size": (24, 32), "classes": ("a", "b", "c", "d")}
    with pytest.raises(DataError, match=message):
        SegmentedImages(**(plain | fields))  # type: ignore[arg-type]


def test_pixels_without_a_class_stay_so() -> None:
    def read() -> tuple[Tensor, Tensor]:
        image, mask = pair(0)
        mask[:, -6:] = IGNORE
        return image, mask

    masks = examples(reads=[read], size=(48, 64)).gather([0])[1]
    assert (masks[..., -10:] == IGNORE).all() and set(masks.unique().tolist()) == {0, 1, IGNORE}


def test_a_window_has_the_form_of_what_it_is_scaled_to() -> None:
    data = examples(reads=[lambda: pair(0, 24, 48)], size=(24, 48), flip="none", min_area=1.0)
    for seed in range(3):
        masks = data.gather([0], torch.Generator().manual_seed(seed))[1]
        assert torch.equal(masks[0], pair(0, 24, 48)[1].long()), "the only window of the whole area is the image"
