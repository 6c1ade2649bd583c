"""The control loop inside ``fit``: one update a step, frozen at the end, logged, resumed, the same on all processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewbits.deploy import fold_fusion
from fewbits.errors import CheckpointError, TrainingError
from fewbits.layers import fusion_nodes, quantized_layers
from fewbits.train import BalanceFusion, Batches, FitConfig, Hook, TrainState, fit

from . import fusion_workers, workers


def test_the_loop_logs_moves_freezes_and_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = fusion_workers.train(tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "fusion/cat0/log_ratio" in line]
    assert len(logged) == 20
    gains = [line["fusion/cat0/gain_deep"] for line in logged]
    assert len(set(gains[:18])) == 18 and len(set(gains[17:])) == 1  # step 18 of 20 is the first that is frozen
    assert len({line["fusion/cat0/log_ratio"] for line in logged}) == 20
    (node,) = fusion_nodes(whole).values()
    assert node.frozen and node.log_ratio() == pytest.approx(logged[-1]["fusion/cat0/log_ratio"])

    with pytest.raises(KeyboardInterrupt):
        fusion_workers.train(tmp_path / "cut", stop_at=11)
    with pytest.raises(CheckpointError, match=r"started with freeze_at=0\.9, now it is 0\.5"):
        fusion_workers.train(tmp_path / "cut", resume=True, freeze_at=0.5)
    again = fusion_workers.train(tmp_path / "cut", resume=True)
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    for name, value in whole.state_dict().items():
        other = again.state_dict()[name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_constant_norms_for_the_end_of_training_are_what_is_folded(tmp_path: Path) -> None:
    seen: list[tuple[bool, float, float, float]] = []

    class Watch(Hook):
        def after_step(self, state: TrainState) -> None:
            (node,) = fusion_nodes(state.model).values()
            step = quantized_layers(state.model)["head"].input_quantizer.step()  # type: ignore[union-attr]
            seen.append((node.constant, float(node.mu), float(step), float(node.lam[0])))

    whole = fusion_workers.train(tmp_path / "whole", fix_at=0.5, hooks=[Watch()]).eval()
    assert [constant for constant, *_ in seen] == [False] * 10 + [True] * 10
    assert len({step for _, _, step, _ in seen[:10]}) > 1, "the step is trained until then"
    assert len({tuple(rest) for _, *rest in seen[10:]}) == 1, "mean, step and gains stay"
    with pytest.raises(KeyboardInterrupt):
        fusion_workers.train(tmp_path / "cut", fix_at=0.5, stop_at=14, hooks=[Watch()])
    with pytest.raises(CheckpointError, match=r"started with fix_at=0\.5, now it is 0\.8"):
        fusion_workers.train(tmp_path / "cut", fix_at=0.8, resume=True, hooks=[Watch()])
    again = fusion_workers.train(tmp_path / "cut", fix_at=0.5, resume=True, hooks=[Watch()])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
    x = fusion_workers.Scenes().x
    before = whole(x)
    assert fold_fusion(whole, [x]) == {"cat0": "requant into head"}
    assert torch.equal(whole(x), before)


def test_what_fixes_the_norms_needs_a_time() -> None:
    with pytest.raises(TrainingError, match="fix and fix_at need each other"):
        BalanceFusion(fix_at=0.5)
    with pytest.raises(TrainingError, match="fix_at is a share"):
        BalanceFusion(fix=print, fix_at=1.5)


def test_a_second_run_moves_the_gains_again() -> None:
    model = fusion_workers.train(None)
    (node,) = fusion_nodes(model).values()
    before, config = node.lam.clone(), FitConfig(max_steps=4, lr=0.05, accelerator="cpu", progress=False)
    assert node.frozen
    hooks = [BalanceFusion(freeze_at=1.0)]
    fit(model, Batches(fusion_workers.Scenes(), 8), fusion_workers.loss, config, hooks=hooks)
    assert not node.frozen and not torch.equal(node.lam, before)


def test_two_processes_hold_the_gains_of_one(tmp_path: Path, warm_server: None) -> None:
    port = workers.free_port()
    ranks = [workers.start(fusion_workers.train_rank, rank, 2, port, tmp_path) for rank in range(2)]
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    (node,) = fusion_nodes(fusion_workers.train(None)).values()
    assert torch.equal(first, second) and float(first.abs().max()) > 0.01
    torch.testing.assert_close(first, node.lam, rtol=1e-3, atol=1e-5)


def test_there_must_be_something_to_control() -> None:
    model, config = fusion_workers.Fused(), FitConfig(max_steps=1, accelerator="cpu", progress=False)
    with pytest.raises(TrainingError, match="no balanced fusion node"):
        fit(model, Batches(fusion_workers.Scenes(), 8), fusion_workers.loss, config, hooks=[BalanceFusion()])
    with pytest.raises(TrainingError, match="freeze_at is a share"):
        BalanceFusion(freeze_at=90)
