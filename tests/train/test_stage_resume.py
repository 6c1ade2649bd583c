"""A run with a curriculum that is stopped inside a stage, at its border or behind it ends as one that was not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from torch import nn

from fewbits.errors import CheckpointError
from fewbits.train import Checkpoints, Curriculum, Hook, Stage, Staged, TrainState, fit
from fewbits.train.distill import FeatureTerm, distilled

from . import staged as s
from .test_resume import same

CURRICULUM = Curriculum([Stage(["backbone"], 1 / 3, ["feat"]), Stage(["head"], 2 / 3)])


class Killed(BaseException):
    """What a kill looks like from inside: nothing may catch it."""


class KillAt(Hook):
    def __init__(self, point: str, step: int) -> None:
        self.point, self.step = point, step

    def on_stage_change(self, state: TrainState, stage: str) -> None:
        self._kill("on_stage_change", state.step)

    def before_step(self, state: TrainState) -> None:
        self._kill("before_step", state.step)

    def after_step(self, state: TrainState) -> None:
        self._kill("after_step", state.step)

    def _kill(self, point: str, step: int) -> None:
        if (point, step) == (self.point, self.step):
            raise Killed


def train(out: Path, every: int, point: str = "never", step: int = 0, curriculum: Curriculum = CURRICULUM) -> nn.Module:
    teacher = s.float_net().requires_grad_(False).eval()
    student = s.quantized(copy.deepcopy(teacher).requires_grad_(True))
    loss = distilled(student, teacher, {"feat": FeatureTerm(["backbone"], F.mse_loss)})
    config = s.config(
        optimizer="adamw", lr=0.01, quantizer_lr=0.1, ema=0.8, clip=5.0, warmup_steps=1, checkpoint_every=every
    )
    stages = Staged(curriculum, s.calibration(), loss)
    fit(
        student, s.batches(), s.cross_entropy, config,
        out=out, stages=stages, hooks=[KillAt(point, step)], resume=True,
    )  # fmt: skip
    return student


def content(out: Path) -> tuple[bytes, Any]:
    newest = Checkpoints(out / "checkpoints", 2).paths()[0]
    return (out / "metrics.jsonl").read_bytes(), Checkpoints.read(newest)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    out = tmp_path_factory.mktemp("whole")
    return out, train(out, 1)


@pytest.mark.parametrize(
    ("every", "kills"),
    [
        (1, [("before_step", 2)]),  # inside stage 1
        (1, [("on_stage_change", 3)]),  # the newest checkpoint is that of the border
        (1, [("before_step", 3), ("before_step", 3)]),  # behind the border, and again from the same checkpoint
        (2, [("after_step", 4)]),  # the newest checkpoint is inside stage 1, the border is crossed again
        (1, [("after_step", 1), ("on_stage_change", 3), ("before_step", 4), ("after_step", 8)]),
    ],
)
def test_a_stopped_run_ends_bit_equal(
    tmp_path: Path, whole: tuple[Path, nn.Module], every: int, kills: list[tuple[str, int]]
) -> None:
    for point, step in kills:
        with pytest.raises(Killed):
            train(tmp_path, every, point, step)
    model = train(tmp_path, every)
    (lines, ours), (expected, theirs) = content(tmp_path), content(whole[0])
    assert lines == expected
    assert same(ours, theirs)
    assert same(dict(model.state_dict()), dict(whole[1].state_dict()))


def test_a_run_does_not_go_on_with_another_curriculum(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, 1, "before_step", 4)
    other = Curriculum([Stage(["backbone"], 0.5, ["feat"]), Stage(["head"], 0.5)])
    with pytest.raises(CheckpointError, match=r"curriculum.stages.0.share was 0.33.*, now 0.5"):
        train(tmp_path, 1, curriculum=other)
