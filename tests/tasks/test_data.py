from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.errors import DataError
from fewbits.tasks.data import crop_and_flip, normalize, stratified_indices


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gather_normalises_without_augmentation(tiny):
    examples = tiny(crop_padding=2, flip=True)
    images, labels = examples.gather([3, 0, 3])
    by_hand = (examples.images[3].double() / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.4]
    ).view(3, 1, 1)
    assert images.dtype == torch.float32 and images.shape == (3, 3, 6, 5)
    torch.testing.assert_close(images[0].double(), by_hand, rtol=1e-5, atol=1e-6)
    assert torch.equal(images[0], images[2])
    assert labels.tolist() == [3, 0, 3]


def test_gather_takes_sequences_and_tensors(tiny):
    from_list, from_tensor = tiny().gather([5, 1]), tiny().gather(torch.tensor([5, 1]))
    assert all(torch.equal(a, b) for a, b in zip(from_list, from_tensor))


def test_augmentation_is_a_function_of_the_generator_alone(tiny):
    examples, rows = tiny(crop_padding=2, flip=True), list(range(40))
    torch.manual_seed(1)
    first = examples.gather(rows, generator(7))[0]
    torch.manual_seed(2)
    assert torch.equal(first, examples.gather(rows, generator(7))[0])
    assert not torch.equal(first, examples.gather(rows, generator(8))[0])


def test_every_augmented_image_is_a_window_of_the_padded_image_or_its_mirror():
    images = torch.arange(1, 241, dtype=torch.uint8).reshape(4, 3, 4, 5).repeat(50, 1, 1, 1)
    cut = crop_and_flip(images, padding=1, flip=True, generator=generator())
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    hits = []
    for top in range(3):
        for left in range(3):
            window = padded[:, :, top : top + 4, left : left + 5]
            hits += [(cut == w).flatten(1).all(1) for w in (window, window.flip(3))]
    assert torch.stack(hits).any(0).all()
    assert all(h.any() for h in hits), "each of 9 shifts and 2 mirrorings occurs among 200 images"


@pytest.mark.parametrize(("padding", "flip"), [(0, True), (2, False)])
def test_each_augmentation_can_be_had_alone(tiny, padding, flip):
    images = tiny().images
    cut = crop_and_flip(images, padding, flip, generator())
    assert cut.shape == images.shape and cut.dtype == torch.uint8
    kept = [torch.equal(a, b) or (flip and torch.equal(a, b.flip(2))) for a, b in zip(cut, images)]
    assert all(kept) if flip else not all(kept)


@given(
    counts=st.lists(st.integers(0, 30), min_size=2, max_size=6).filter(lambda c: sum(c) > 0),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_stratified_indices_keep_the_share_of_each_class(counts, share, seed):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator())]
    n = max(1, round(share * len(labels)))
    chosen = stratified_indices(labels, n, seed)
    assert len(chosen.unique()) == len(chosen) == n
    assert torch.equal(chosen, chosen.sort().values)
    for label, count in enumerate(counts):
        assert abs(int((labels[chosen] == label).sum()) - n * count / len(labels)) < 1
    assert torch.equal(chosen, stratified_indices(labels, n, seed))


def test_subset_depends_on_the_seed(tiny):
    assert torch.equal(tiny().subset(12, 1).images, tiny().subset(12, 1).images)
    assert not torch.equal(tiny().subset(12, 1).images, tiny().subset(12, 2).images)


def test_split_is_a_partition(tiny):
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 3, 6, 5)
    first, second = tiny(images=images).split(0.75)
    assert (len(first), len(second)) == (30, 10)
    ids = torch.cat([first.images, second.images])[:, 0, 0, 0]
    assert ids.sort().values.tolist() == list(range(40))


def test_batches_cover_everything_in_order(tiny):
    batches = list(tiny().batches(16))
    assert [len(labels) for _, labels in batches] == [16, 16, 8]
    assert torch.equal(torch.cat([images for images, _ in batches]), tiny().gather(range(40))[0])


def test_normalize_leaves_its_input_alone():
    images = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    assert normalize(images, (0.5,), (0.25,)).flatten().tolist() == [2.0] * 4
    assert images.min() == 255


@pytest.mark.parametrize("label", [4, -1])
def test_label_outside_range_names_value_and_index(tiny, label):
    labels = torch.zeros(40, dtype=torch.int64)
    labels[17] = label
    with pytest.raises(DataError, match=rf"label {label} of example 17 is outside 0\.\.3"):
        tiny(labels=labels)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": (0.5,), "std": (0.2,)}, r"images have 3 channels, but mean=\[0.5\]"),
        ({"std": (0.2, 0.0, 0.1)}, "std above 0"),
        ({"labels": torch.zeros(39, dtype=torch.int64)}, "40 images but 39 labels"),
        ({"labels": torch.zeros(40)}, "labels must be int64"),
        ({"images": torch.zeros(40, 3, 6, 5)}, "images must be uint8 .* got torch.float32"),
        ({"images": torch.zeros(40, 6, 5, dtype=torch.uint8)}, r"images must be uint8 \[N, C, H, W\]"),
        ({"classes": ("a",), "labels": torch.zeros(40, dtype=torch.int64)}, "at least two classes"),
        ({"crop_padding": -1}, "crop_padding must be at least 0"),
    ],
)
def test_bad_fields_are_named(tiny, fields, message):
    with pytest.raises(DataError, match=message):
        tiny(**fields)


def test_empty_data_set(tiny):
    with pytest.raises(DataError, match="empty"):
        tiny(images=torch.zeros(0, 3, 6, 5, dtype=torch.uint8), labels=torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("size", [0, -3])
def test_batch_size_below_one_is_refused_at_once(tiny, size):
    with pytest.raises(DataError, match=f"batch_size must be at least 1, got {size}"):
        tiny().batches(size)


@pytest.mark.parametrize("n", [0, 41])
def test_subset_larger_than_the_data(tiny, n):
    with pytest.raises(DataError, match=f"cannot take {n} of 40 examples"):
        tiny().subset(n)


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1.5])
def test_split_with_an_empty_side(tiny, fraction):
    with pytest.raises(DataError, match="leaves one side empty"):
        tiny().split(fraction)
