"""Taps of plain features: pairs of student and teacher, with a teacher that runs no further than it must."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fewbits.errors import TrainingError
from fewbits.losses.features import FeatureTaps, gradient_ratio


class Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.calls = nn.Linear(4, 4), nn.Linear(4, 2), 0

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        low = self.low(x)
        return low, {"high": self.high(low)}


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Levels(), Levels()

    def forward(self, x: Tensor) -> Tensor:
        low: Tensor = self.backbone(x)[0]
        out: Tensor = self.head(low)[0]
        return out


def models() -> tuple[Pyramid, Pyramid, Tensor]:
    student = Pyramid()
    teacher = copy.deepcopy(student)
    nn.init.normal_(teacher.backbone.low.weight)
    return student, teacher, torch.randn(3, 4)


def test_each_tensor_of_a_tap_is_a_pair_and_the_teacher_stops_behind_the_last() -> None:
    student, teacher, x = models()
    with FeatureTaps(student, teacher, ["backbone", "backbone.low"]) as taps:
        student(x)
        taps.teach(x)
    found = taps.pairs()
    assert [name for name, _, _ in found] == ["backbone", "backbone", "backbone.low"]
    low, parts = teacher.backbone(x)
    assert all(torch.equal(t, want) for (_, _, t), want in zip(found, (low, parts["high"], low)))
    assert torch.equal(found[2][1], student.backbone.low(x))
    assert (student.head.calls, teacher.head.calls) == (1, 0)
    assert found[0][1].requires_grad and not found[0][2].requires_grad
    assert not any(m._forward_hooks for m in [*student.modules(), *teacher.modules()])


def test_a_tap_that_runs_twice_is_two_pairs() -> None:
    student, teacher, x = models()
    student.head, teacher.head = student.backbone, teacher.backbone
    with FeatureTaps(student, teacher, ["backbone.low"]) as taps:
        student(x)
        taps.teach(x)
    assert len(taps.pairs()) == 2


def test_the_ratio_of_gradients() -> None:
    x, y = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([12.0], requires_grad=True)
    half_squares = (x * x).sum() / 2 + (y * y).sum() / 2
    assert gradient_ratio((2 * x).sum(), half_squares, [x]) == pytest.approx(8**0.5 / 5)
    assert gradient_ratio((2 * x).sum(), half_squares, [x, y]) == pytest.approx(8**0.5 / 13)
    assert gradient_ratio(x.sum(), torch.zeros((), requires_grad=True) * 1.0, [x]) == float("inf")


class Silent(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return ()


def test_a_tap_without_a_tensor_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Silent())
    with FeatureTaps(model, copy.deepcopy(model), ["1"]) as taps:
        model(torch.randn(2, 4))
        taps.teach(torch.randn(2, 4))
    with pytest.raises(TrainingError, match="tap '1' returns no tensor, but tuple"):
        taps.pairs()


def test_what_does_not_pair_is_an_error() -> None:
    student, teacher, x = models()
    with pytest.raises(TrainingError, match="no module 'backbon' to tap; did you mean 'backbone'"):
        FeatureTaps(student, teacher, ["backbon"])
    with FeatureTaps(student, teacher, ["backbone"]) as taps:
        student(x)
    with pytest.raises(TrainingError, match=r"'backbone' ran 1 times in the student and 0 times in the teacher"):
        taps.pairs()
    teacher.backbone.low = nn.Linear(4, 6)
    teacher.backbone.high = nn.Linear(6, 2)
    with taps:
        student(x)
        taps.teach(x)
    with pytest.raises(TrainingError, match=r"'backbone' returns \[\[3, 4\], \[3, 2\]\] in the student, \[\[3, 6\]"):
        taps.pairs()
