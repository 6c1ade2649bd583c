from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import DataError
from fewbits.losses.dice import soft_dice
from fewbits.tasks.masks import IGNORE
from fewbits.tasks.segmentation import PixelLoss, answers, balanced_weights, score
from fewbits.tasks.segmented import SegmentedImages


def drawn(count: int = 5, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Random logits, and masks that half agree with them; the last class is never right nor answered."""
    logits = torch.randn(count, classes, 6, 7)
    logits[:, -1] = -9
    masks = logits.argmax(1).where(torch.rand(count, 6, 7) < 0.5, torch.randint(0, classes - 1, (count, 6, 7)))
    masks[0] = 0  # an image of ground only
    masks[1, :2] = IGNORE
    return logits, masks


def overlaps(predicted: Tensor, masks: Tensor, kinds: list[int], factor: int) -> list[float]:
    """IoU (factor 1) or Dice (2) of the classes that are there, pixel by pixel."""
    found = []
    for kind in kinds:
        hits = wrong = 0
        for got, want in zip(predicted.flatten().tolist(), masks.flatten().tolist()):
            if want != IGNORE:
                hits, wrong = hits + (got == want == kind), wrong + ((got == kind) != (want == kind))
        found += [factor * hits / (factor * hits + wrong)] if hits + wrong else []
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_metrics_equal_counting_pixel_by_pixel() -> None:
    logits, masks = drawn()
    found = score(iter([(logits[:2], masks[:2]), (logits[2:], masks[2:])]), ground=0)
    predicted, valid = logits.argmax(1), masks != IGNORE
    assert found["miou"] == pytest.approx(100 * mean(overlaps(predicted, masks, [0, 1, 2, 3], 1)))
    assert found["dice"] == pytest.approx(100 * mean(overlaps(predicted, masks, [1, 2, 3], 2)))
    of_images = [overlaps(p[None], m[None], [1, 2, 3], 2) for p, m in zip(predicted, masks)]
    assert found["dice_images"] == pytest.approx(100 * mean([mean(o) for o in of_images if o]))
    assert found["pixel_accuracy"] == pytest.approx(100 * float((predicted == masks)[valid].double().mean()))
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, masks, ignore_index=IGNORE)), abs=1e-5)
    assert sum(map(sum, found["confusion"])) == int(valid.sum())
    assert found["confusion"][1][2] == int(((masks == 1) & (predicted == 2)).sum())


def test_miou_and_dice_equal_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_f1_score, multiclass_jaccard_index

    logits, masks = drawn(classes=3)
    found, predicted = score([(logits, masks)], ground=None), logits.argmax(1)
    given = {"num_classes": 3, "ignore_index": IGNORE, "average": "none"}
    assert found["miou"] == pytest.approx(100 * float(multiclass_jaccard_index(predicted, masks, **given)[:2].mean()))
    assert found["dice"] == pytest.approx(100 * float(multiclass_f1_score(predicted, masks, **given)[:2].mean()))


def test_right_answers_score_full_and_none_is_an_error() -> None:
    masks = torch.randint(0, 3, (2, 8, 8))
    found = score([(9.0 * F.one_hot(masks, 3).movedim(-1, 1).float(), masks)], ground=0)
    for name in ("miou", "dice", "dice_images", "boundary_f1", "pixel_accuracy"):
        assert found[name] == pytest.approx(100), name
    with pytest.raises(DataError, match="no images"):
        score([])
    with pytest.raises(DataError, match=r"NaN among the logits of images 0\.\.1"):
        score([(torch.full((2, 3, 8, 8), math.nan), masks)])


def test_the_loss_is_the_sum_of_its_parts() -> None:
    logits, masks = drawn()
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0])
    loss = PixelLoss(cross_entropy=0.7, dice=0.4, class_weights=weights, ground=0, label_smoothing=0.1)
    entropy = F.cross_entropy(logits, masks, weights, ignore_index=IGNORE, label_smoothing=0.1)
    want = 0.7 * entropy + 0.4 * soft_dice(logits, masks, ignore=IGNORE, ground=0)
    assert torch.allclose(loss(nn.Identity(), (logits, masks)), want)
    nothing = torch.full_like(masks, IGNORE)
    assert PixelLoss(dice=1)(nn.Identity(), (logits.requires_grad_(), nothing)).item() == 0
    with pytest.raises(DataError, match="not both 0"):
        PixelLoss(cross_entropy=0, dice=0)


def test_masks_that_do_not_fit_are_told() -> None:
    logits, masks = drawn()
    with pytest.raises(DataError, match=r"label 4, but the model tells 4 classes apart, 0\.\.3; 255 is for"):
        PixelLoss()(nn.Identity(), (logits, masks.clamp(max=3) + 1))
    with pytest.raises(DataError, match=r"do not fit masks \[5, 6, 6\]"):
        PixelLoss()(nn.Identity(), (logits, masks[:, :, :6]))
    with pytest.raises(DataError, match=r"expected logits \[batch, classes, H, W\].*got \[5, 4\]"):
        PixelLoss()(nn.Identity(), (logits[:, :, 0, 0], masks))


def data(*masks: Tensor) -> SegmentedImages:
    reads = [lambda m=m: (torch.zeros(3, *m.shape, dtype=torch.uint8), m) for m in masks]
    return SegmentedImages(reads=reads, classes=("a", "b", "c"), size=(8, 8))


def test_balanced_weights_are_median_frequency_over_frequency() -> None:
    first, second = torch.zeros(2, 8, 8, dtype=torch.uint8)
    first[0] = 1  # 8 of 64 pixels
    second[:2], second[2:4], second[7] = 1, 2, IGNORE  # 16, 16 and 24 of 56
    found = balanced_weights(data(first, second))
    frequency = torch.tensor([(56 + 24) / 120, (8 + 16) / 120, 16 / 56])
    assert torch.allclose(found, frequency.median() / frequency)
    with pytest.raises(DataError, match="no training image has the class 'c'"):
        balanced_weights(data(first))


def test_answers_come_in_order_and_leave_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train()
    masks = [torch.full((8, 8), i, dtype=torch.uint8) for i in (0, 1, 2)]
    found = list(answers(model, data(*masks), 2))
    assert [tuple(logits.shape) for logits, _ in found] == [(2, 3, 8, 8), (1, 3, 8, 8)]
    assert torch.cat([m for _, m in found])[:, 0, 0].tolist() == [0, 1, 2]
    assert model.training and not model[1].running_mean.any()
    with pytest.raises(DataError, match=r"expected logits \[batch, 3, H, W\].*num_classes="):
        list(answers(nn.Conv2d(3, 4, 1), data(*masks), 2))
