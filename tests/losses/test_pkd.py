"""PKD is 1 - Pearson's r of each channel: blind to scale and level, and zero where the maps agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbits.errors import TrainingError
from fewbits.losses import pkd


def maps(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, channels, side, side, generator=generator) for channels, side in ((3, 8), (5, 4))]


def test_it_is_one_minus_pearson_of_each_channel_summed_over_levels() -> None:
    expected = 0.0
    for mine, theirs in zip(maps(0), maps(1)):
        for channel in range(mine.shape[1]):
            n = mine[:, channel].numel()
            both = torch.stack([mine[:, channel].flatten(), theirs[:, channel].flatten()])
            r = float(torch.corrcoef(both)[0, 1])
            expected += (1 - r) * (n - 1) / n / mine.shape[1]  # the deviations are unbiased, the mean is not
    assert float(pkd(maps(0), maps(1))) == pytest.approx(expected, abs=1e-5)


def test_equal_maps_cost_nothing_at_any_positive_scale_and_shift_of_a_channel() -> None:
    teacher = maps(0)
    student = [3 * m * (1 + torch.arange(m.shape[1])[:, None, None]) - 7 for m in teacher]
    assert float(pkd(teacher, teacher)) == 0.0
    assert float(pkd(student, teacher)) < 1e-9
    assert float(pkd([-m for m in teacher], teacher)) == pytest.approx(2 * (127 / 128 + 31 / 32), abs=1e-4)


def test_gradients_go_to_the_student_alone_and_are_finite_where_a_channel_is_constant() -> None:
    student = [torch.ones(1, 2, 1, 1, requires_grad=True), torch.zeros(2, 3, 4, 4, requires_grad=True)]
    teacher = [torch.randn(m.shape, requires_grad=True) for m in student]
    pkd(student, teacher).backward()
    assert all(m.grad is None for m in teacher)
    assert all(m.grad is not None and m.grad.isfinite().all() for m in student)


def test_half_precision_is_computed_in_float32() -> None:
    mine, theirs = [m.half() * 100 for m in maps(0)], [m.half() for m in maps(1)]
    assert pkd(mine, theirs).dtype == torch.float32
    assert float(pkd(mine, theirs)) == pytest.approx(float(pkd(maps(0), maps(1))), rel=1e-2)


def test_maps_that_do_not_fit_are_told() -> None:
    with pytest.raises(TrainingError, match="2 of the student and 1 of the teacher"):
        pkd(maps(0), maps(0)[:1])
    with pytest.raises(TrainingError, match=r"level 0: the student's map has shape \[2, 3, 8, 8\].*\[2, 5, 4, 4\]"):
        pkd(maps(0), maps(0)[::-1])
