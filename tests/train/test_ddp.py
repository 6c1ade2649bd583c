"""Two processes train as one does at the same global batch, and resume exactly."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import torch

from . import staged, workers


def run(out: Path, world: int, kill_at: int | None = None) -> list[int | None]:
    out.mkdir(exist_ok=True)
    port = workers.free_port()
    ranks = [workers.start(workers.train_rank, rank, world, port, out, kill_at) for rank in range(world)]
    for process in ranks:
        process.join(60)
    return [process.exitcode for process in ranks]


def losses(out: Path) -> torch.Tensor:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] if "loss" in line else line["eval"]["loss"] for line in lines])


def test_two_processes_equal_one_and_resume_to_the_bit(tmp_path: Path, warm_server: None) -> None:
    one, two, killed = tmp_path / "one", tmp_path / "two", tmp_path / "killed"
    assert run(one, 1) == [0]
    assert run(two, 2) == [0, 0]
    codes = run(killed, 2, kill_at=5)  # the second to go may see its peer vanish before it kills itself
    assert -signal.SIGKILL in codes and 0 not in codes
    assert run(killed, 2) == [0, 0]
    torch.testing.assert_close(losses(two), losses(one), rtol=1e-5, atol=1e-6)
    weights = [torch.load(out / "weights.pt", weights_only=True) for out in (one, two, killed)]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights[2], weights[1], rtol=0, atol=0)
    assert (killed / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()


def test_two_processes_go_through_the_stages_of_a_curriculum_as_one_does(tmp_path: Path, warm_server: None) -> None:
    for world in (1, 2):
        port = workers.free_port()
        ranks = [workers.start(staged.train_rank, rank, world, port, tmp_path) for rank in range(world)]
        for process in ranks:
            process.join(100)
        assert [process.exitcode for process in ranks] == [0] * world
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("0_of_1", "0_of_2", "1_of_2"))
    tensors = [name for name, value in one.items() if isinstance(value, torch.Tensor)]
    assert any(name.startswith("head") for name in tensors)
    for name in tensors:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        torch.testing.assert_close(first[name], one[name], rtol=1e-2, atol=1e-3)  # codes flip at their borders
