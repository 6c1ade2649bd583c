"""A run killed ten times ends as one that was not: weights, metrics, plan, optimizer, random numbers, to the bit."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.train import Checkpoints

from . import workers


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def last_step(out: Path) -> int:
    paths = Checkpoints(out / "checkpoints", 2).paths()
    return int(paths[0].name.split("_")[1]) if paths else 0


def finish(out: Path) -> None:
    process = workers.start(workers.train, out)
    process.join(60)
    assert process.exitcode == 0


def require_same_run(out: Path, reference: Path) -> None:
    for name in ("metrics.jsonl", "plan.json"):
        assert (out / name).read_bytes() == (reference / name).read_bytes()
    ours, theirs = (torch.load(folder / "weights.pt", weights_only=True) for folder in (out, reference))
    assert same(ours, theirs)
    paths = [Checkpoints(folder / "checkpoints", 2).paths() for folder in (out, reference)]
    assert [p.name.split("_")[1] for p in paths[0]] == ["00000040", "00000036"]
    for one, other in zip(*paths):
        assert same(Checkpoints.read(one), Checkpoints.read(other))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, warm_server: None) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    finish(out)
    return out


def test_a_run_killed_ten_times_ends_bit_equal(tmp_path: Path, reference: Path) -> None:
    chance = random.Random(0)
    points = [*workers.POINTS, *chance.sample(workers.POINTS, 3)]
    chance.shuffle(points)
    for number, point in enumerate(points):
        progress_until = 4 * number * 40 // 48  # spread the kills over the run
        step = chance.randint(max(last_step(tmp_path), progress_until), min(36, progress_until + 8))
        process = workers.start(workers.train, tmp_path, point, step)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, (point, step)
    finish(tmp_path)
    require_same_run(tmp_path, reference)
    assert not list(tmp_path.glob("checkpoints/*.damaged"))  # a kill leaves no half-written checkpoint behind


def test_a_run_killed_from_outside_at_any_moment_ends_bit_equal(tmp_path: Path, reference: Path) -> None:
    chance = random.Random(1)
    for _ in range(4):
        process = workers.start(workers.train, tmp_path)
        time.sleep(chance.uniform(0.1, 0.6))
        process.kill()
        process.join(60)
    finish(tmp_path)
    require_same_run(tmp_path, reference)


def test_a_damaged_checkpoint_is_set_aside_and_the_run_still_ends_bit_equal(tmp_path: Path, reference: Path) -> None:
    process = workers.start(workers.train, tmp_path, "before_step", 13)
    process.join(60)
    newest = Checkpoints(tmp_path / "checkpoints", 2).paths()[0]
    assert newest.name.startswith("step_00000012_")
    newest.write_bytes(newest.read_bytes()[:-100])
    finish(tmp_path)
    assert newest.with_suffix(".damaged").exists()
    require_same_run(tmp_path, reference)
