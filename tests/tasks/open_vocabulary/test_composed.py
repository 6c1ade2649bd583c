from __future__ import annotations

import pytest
import torch

from fewbits.errors import DataError
from fewbits.tasks.detection import DetectionExamples
from fewbits.tasks.open_vocabulary import composed
from fewbits.tasks.open_vocabulary.composed import DARK, OUTLINES, PATTERNS, RGB, SHADE, compose, composed_examples
from fewbits.tasks.open_vocabulary.words import COLOURS, NUMBERS, SHAPES, TEXTURES, Composition, World
from fewbits.tasks.scenes import digit_crops

SMALL = World(shapes=("circle", "square", "ring"), colours=("red", "green", "blue"), digits=NUMBERS[:4])


@pytest.fixture(scope="module")
def train() -> DetectionExamples:
    return composed_examples(SMALL, "train", 300, size=96)


def test_names_are_composed_of_words() -> None:
    assert Composition("circle", "red", "striped").name == "a red striped circle"
    assert Composition("seven", "orange").name == "an orange seven"


@pytest.mark.parametrize("seed", range(4))
def test_every_word_of_a_novel_class_is_in_base_classes_of_its_kind(seed: int) -> None:
    world = World(novel=0.3, seed=seed)
    novel = world.classes[len(world.base) :]
    assert len(world.classes) == 5 * 5 * 3 + 10 * 5 and len(novel) == round(0.3 * 75) + round(0.3 * 50)
    assert not set(novel) & set(world.base)
    for composition in novel:
        kind = [c for c in world.base if (c.texture is None) == (composition.texture is None)]
        assert all(sum(word in c.words for c in kind) >= 2 for word in composition.words)


def test_which_classes_are_novel_and_frequent_follows_from_the_seed() -> None:
    assert World(seed=1).groups == World(seed=1).groups
    assert World(seed=1).groups["novel"] != World(seed=2).groups["novel"]
    assert World(novel=0.0, seed=1).groups["rare"] != World(novel=0.0, seed=2).groups["rare"]


def test_groups_are_thirds_of_a_long_tail() -> None:
    shares = dict(zip((c.name for c in SMALL.base), SMALL.shares))
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares.values()) / min(shares.values()) == pytest.approx(len(shares))  # Zipf: 1 to 1/r
    groups = SMALL.groups
    frequent, common, rare = (groups[name] for name in ("frequent", "common", "rare"))
    assert sorted(frequent + common + rare) == sorted(groups["base"])
    assert min(map(shares.get, frequent)) > max(map(shares.get, common))
    assert min(map(shares.get, common)) > max(map(shares.get, rare))
    assert len(set(World(tail=0.0).shares)) == 1


def test_training_shows_base_classes_by_their_shares(train: DetectionExamples) -> None:
    assert train.classes == SMALL.groups["base"]
    counts = torch.zeros(len(train.classes))
    for objects in train.objects:
        counts.index_add_(0, objects.labels, torch.ones(len(objects.labels)))
    # the error of a share estimated from n objects is about sqrt(share / n)
    expected = counts.sum() * torch.tensor(SMALL.shares)
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 1).all()


def test_tests_show_all_classes_alike_and_base_ones_keep_their_labels(train: DetectionExamples) -> None:
    test = composed_examples(SMALL, "test", 300, size=96)
    assert test.classes == SMALL.groups["base"] + SMALL.groups["novel"]
    assert test.classes[: len(train.classes)] == train.classes
    counts = torch.bincount(torch.cat([o.labels for o in test.objects]), minlength=len(test.classes))
    assert (counts - counts.float().mean()).abs().max() < 5 * counts.float().mean().sqrt()


def test_a_scene_depends_on_world_seed_split_and_index_only() -> None:
    few, many = compose(SMALL, "train", 2, seed=3), compose(SMALL, "train", 4, seed=3)
    assert all(torch.equal(a.image, b.image) and torch.equal(a.boxes, b.boxes) for a, b in zip(few, many))
    assert not torch.equal(few[0].image, few[1].image)
    assert not torch.equal(few[0].image, compose(SMALL, "train", 1, seed=4)[0].image)
    assert not torch.equal(few[0].image, compose(SMALL, "test", 1, seed=3)[0].image)


def test_test_scenes_have_ground_and_digits_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = World(digits=(), novel=0.0, tail=0.0)  # both splits show the same classes equally often
    assert not torch.equal(compose(alike, "train", 1)[0].image, compose(alike, "test", 1)[0].image)
    asked = list[str]()
    monkeypatch.setattr(composed, "digit_crops", lambda split: asked.append(split) or digit_crops(split))
    compose(World(), "test", 6)
    assert set(asked) == {"test"}


def test_boxes_are_tight_around_ink_of_their_colour() -> None:
    for scene in compose(SMALL, "test", 12, size=96, objects=(2, 5)):
        for (left, top, right, low), label in zip(scene.boxes.int().tolist(), scene.labels.tolist()):
            inside = scene.mask[top:low, left:right] == label + 1
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            pixels = scene.image[:, top:low, left:right][:, inside].T.float()
            colour = torch.tensor(RGB[SMALL.classes[label].colour]).float()
            tones = [(pixels - tone * colour).abs().amax(1) <= SHADE + 1 for tone in (1, DARK)]
            assert (tones[0] | tones[1]).all() and tones[0].any()
            dark = tones[1].float().mean()
            assert (dark == 0) == (SMALL.classes[label].texture in (None, "solid"))


def test_every_word_has_its_own_look() -> None:
    assert set(OUTLINES) == set(SHAPES) and set(PATTERNS) == {None, *TEXTURES} and set(RGB) == set(COLOURS)
    middles = (2 * torch.arange(32) + 1) / 32 - 1
    grid = middles.expand(32, 32), middles[:, None].expand(32, 32)
    outlines = [OUTLINES[name](*grid) for name in SHAPES]
    patterns = [PATTERNS[name](*(2 * g for g in grid)) for name in TEXTURES]
    for looks in (outlines, patterns):
        for i, one in enumerate(looks):
            assert all((one != other).float().mean() > 0.08 for other in looks[:i])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shapes": ("circel",)}, "'circel' of shapes; did you mean 'circle'"),
        ({"colours": ("red", "red")}, "must differ"),
        ({"novel": 1.0}, "0 <= novel < 1"),
        ({"tail": -1.0}, "tail >= 0"),
        ({"novel": 0.9}, "ask for at most"),
        ({"shapes": (), "digits": ()}, "three or more"),
    ],
)
def test_wrong_worlds_are_told(wrong: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        World(**wrong)


@pytest.mark.parametrize("wrong", [{"split": "val"}, {"count": 0}, {"size": 8}, {"objects": (0, 3)}])
def test_wrong_numbers_are_told(wrong: dict) -> None:
    with pytest.raises(DataError, match="scenes"):
        compose(SMALL, **{"split": "train", "count": 1} | wrong)
