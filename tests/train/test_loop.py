from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fewbits.errors import CheckpointError, QuantizationError, TrainingError
from fewbits.plan import LayerPlan, Plan, TensorPlan
from fewbits.train import Batches, Checkpoints, FitConfig, Hook, TrainState, fit
from fewbits.train.launch import require_calibrated

from .workers import Noisy, Quiet, cross_entropy, evaluate, tiny_model

CONFIG = FitConfig(epochs=2, lr=0.05, log_every=2, checkpoint_every=3, accelerator="cpu", progress=False)


def with_(**changes: Any) -> FitConfig:
    return dataclasses.replace(CONFIG, **changes)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_fit_equals_a_loop_written_by_hand() -> None:
    ours, theirs = tiny_model(0.0), tiny_model(0.0)
    result = fit(ours, Batches(Noisy(), 16), cross_entropy, with_(schedule="constant", clip=1.0))
    scale = [theirs[4].quantizer.scale]
    others = [p for p in theirs.parameters() if p is not scale[0]]
    groups = [{"params": others, "weight_decay": 1e-4}, {"params": scale, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    for epoch in range(2):
        for index in range(6):
            cross_entropy(theirs, Batches(Noisy(), 16).batch(epoch, index)).backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(weights(ours), weights(theirs))
    assert result.steps == 12 and result.checkpoint is None and result.metrics == {}


def test_accumulation_equals_a_big_batch() -> None:
    whole, parts = tiny_model(0.0, norm=False), tiny_model(0.0, norm=False)
    order = torch.arange(96)

    class InOrder:
        def __init__(self, size: int) -> None:
            self.size = size

        def __len__(self) -> int:
            return 96 // self.size

        def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
            return Quiet().gather(order[index * self.size : (index + 1) * self.size], None)

        def for_rank(self, rank: int, world: int) -> InOrder:
            return self

        def identity(self) -> dict[str, Any]:
            return {"size": self.size}

    assert fit(whole, InOrder(48), cross_entropy, CONFIG).steps == 4
    assert fit(parts, InOrder(12), cross_entropy, with_(accumulate=4)).steps == 4
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-5, atol=1e-6)
    assert (
        fit(parts, InOrder(12), cross_entropy, with_(accumulate=5)).steps == 4
    )  # the last step of an epoch is shorter


def test_bf16_trains_and_keeps_float32_weights() -> None:
    model, exact = tiny_model(0.0), tiny_model(0.0)
    seen: list[torch.dtype] = []
    model[0].register_forward_hook(lambda *a: seen.append(a[2].dtype))
    for trained, precision in ((model, "bf16-mixed"), (exact, "32-true")):
        fit(trained, Batches(Noisy(), 16), cross_entropy, with_(epochs=10, precision=precision))
    assert set(seen) == {torch.bfloat16} and weights(model).dtype == torch.float32
    assert not torch.equal(weights(model), weights(exact))
    batch = Noisy().gather(torch.arange(96), None)
    losses = [cross_entropy(m.eval(), batch).item() for m in (model, exact)]
    assert losses[0] == pytest.approx(losses[1], abs=0.05) and losses[0] < 0.6  # guessing: ln 2


def test_the_average_is_evaluated_and_left_in_the_model() -> None:
    model = tiny_model(0.0)
    seen: list[Tensor] = []

    def evaluated(module: nn.Module) -> dict[str, float]:
        assert not module.training and not torch.is_grad_enabled()
        seen.append(weights(module))
        return {}

    class Watch(Hook):
        def after_step(self, state: TrainState) -> None:
            latest.append(weights(state.model))

    latest: list[Tensor] = []
    fit(model, Batches(Noisy(), 16), cross_entropy, with_(ema=0.5), evaluate=evaluated, hooks=[Watch()])
    expected = latest[0]
    for values in latest[1:]:
        expected = expected.lerp(values, 0.5)
    torch.testing.assert_close(seen[-1], expected)
    assert len(seen) == 2 and torch.equal(weights(model), seen[-1])


def test_what_is_logged_and_written(tmp_path: Path) -> None:
    result = fit(
        tiny_model(),
        Batches(Noisy(), 16),
        cross_entropy,
        with_(clip=1.0),
        evaluate=evaluate,
        out=tmp_path,
        stage="warm",
    )
    logged = lines(tmp_path)
    steps = [line for line in logged if "eval" not in line]
    assert [(s["step"], s["epoch"]) for s in steps] == [(2, 0), (4, 0), (6, 0), (8, 1), (10, 1), (12, 1)]
    assert all(list(s) == ["step", "epoch", "stage", "loss", "lr", "grad_norm"] for s in steps)
    evaluations = [line for line in logged if "eval" in line]
    assert [(e["step"], e["stage"]) for e in evaluations] == [(6, "warm"), (12, "warm")]
    assert list(evaluations[0]["eval"]) == ["loss", "noise"]  # a confusion matrix is not a number
    assert result.metrics == evaluations[-1]["eval"]
    assert result.checkpoint is not None and result.checkpoint.name.startswith("step_00000012_")
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert next((tmp_path / "tensorboard").iterdir()).stat().st_size > 500


def test_hooks_are_called_in_order_and_modes_are_kept() -> None:
    calls: list[str] = []

    class Recorder(Hook):
        def on_start(self, state: TrainState) -> None:
            calls.append("start")
            state.model[1].eval()  # type: ignore[operator, index]

        def on_stage_change(self, state: TrainState, stage: str) -> None:
            calls.append(stage)

        def before_step(self, state: TrainState) -> None:
            assert state.model.training and not state.model[1].training  # type: ignore[index]
            calls.append(f"before {state.step} of epoch {state.epoch}")

        def after_backward(self, state: TrainState) -> None:
            assert state.model[0].weight.grad is not None  # type: ignore[index, union-attr]
            calls.append("backward")

        def after_step(self, state: TrainState) -> None:
            calls.append(f"after {state.step}")

    config = with_(epochs=None, max_steps=2)
    fit(tiny_model(), Batches(Noisy(), 96), cross_entropy, config, hooks=[Recorder()], evaluate=evaluate, stage="s")
    assert calls == [
        "start", "s", "before 0 of epoch 0", "backward", "after 1", "before 1 of epoch 1", "backward", "after 2",
    ]  # fmt: skip


def test_a_plain_data_loader_trains_and_repeats() -> None:
    data = TensorDataset(Noisy().x, Noisy().y)
    models = [tiny_model(), tiny_model()]
    for model in models:
        fit(model, DataLoader(data, 16, shuffle=True), cross_entropy, CONFIG)
        torch.rand(3)
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path: Path) -> None:
    calls, model = 0, tiny_model()

    def explodes(module: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return cross_entropy(module, batch) * (float("nan") if calls == 5 else 1.0)

    with pytest.raises(TrainingError, match=r"loss of step 4 is nan; the last good checkpoint is .*step_00000003_"):
        fit(model, Batches(Noisy(), 16), explodes, CONFIG, out=tmp_path)
    assert weights(model).isfinite().all()
    result = fit(tiny_model(), Batches(Noisy(), 16), cross_entropy, CONFIG, out=tmp_path, resume=True)
    assert result.steps == 12 and [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8, 10, 12]


def test_a_gradient_that_is_not_finite_is_named() -> None:
    class Explode(Hook):
        def after_backward(self, state: TrainState) -> None:
            next(state.model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]

    with pytest.raises(TrainingError, match=r"gradient norm of step 0 is .*; there is no checkpoint yet"):
        fit(tiny_model(), Batches(Noisy(), 16), cross_entropy, with_(clip=1.0), hooks=[Explode()])


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda model, batch: 3.0, "got float"),
        (lambda model, batch: model(batch[0]), r"got shape \(16, 2\)"),
        (lambda model, batch: model(batch[0]).sum().detach(), r"got shape \(\) without a gradient"),
    ],
)
def test_a_loss_that_is_no_loss_is_named(loss: Any, told: str) -> None:
    with pytest.raises(TrainingError, match=told):
        fit(tiny_model(), Batches(Noisy(), 16), loss, CONFIG)


def test_resuming_another_run_names_what_differs(tmp_path: Path) -> None:
    plan = Plan((("a", LayerPlan(weight=TensorPlan(4))),))
    arguments: dict[str, Any] = {"config": CONFIG, "plan": plan, "hooks": [Hook()], "stage": "train"}

    def go(model: nn.Module, batches: Any, resume: bool = True, **changes: Any) -> None:
        given = {**arguments, **changes}
        fit(model, batches, cross_entropy, given.pop("config"), out=tmp_path, resume=resume, **given)

    go(tiny_model(), Batches(Noisy(), 16))
    go(tiny_model(), Batches(Noisy(), 16), config=with_(keep=5, checkpoint_every=1))  # these may change
    other_plan = Plan((("a", LayerPlan(weight=TensorPlan(2))),))
    for changes, told in [
        ({"config": with_(lr=0.1, clip=2.0)}, r"config\.lr was 0\.05, now 0\.1; config\.clip was None, now 2\.0"),
        ({"plan": other_plan}, r"plan\.rules\.0\.1\.weight\.bits was 4, now 2"),
        ({"plan": None}, r"plan\.version was 1, now 'nothing'"),
        ({"stage": "second"}, "stage was 'train', now 'second'"),
        ({"hooks": []}, r"hooks\.0 was 'Hook', now 'nothing'"),
    ]:
        with pytest.raises(CheckpointError, match=told):
            go(tiny_model(), Batches(Noisy(), 16), **changes)
    with pytest.raises(CheckpointError, match=r"batches\.batch_size was 16, now 8"):
        go(tiny_model(), Batches(Noisy(), 8))
    with pytest.raises(CheckpointError, match="is of another model"):
        go(tiny_model(norm=False), Batches(Noisy(), 16))
    with pytest.raises(CheckpointError, match="holds a run already"):
        go(tiny_model(), Batches(Noisy(), 16), resume=False)


def test_a_finished_run_resumes_to_the_same_result(tmp_path: Path) -> None:
    first, second = tiny_model(), tiny_model()
    config = with_(ema=0.9)
    results = [
        fit(m, Batches(Noisy(), 16), cross_entropy, config, evaluate=evaluate, out=tmp_path, resume=True)
        for m in (first, second)
    ]
    assert torch.equal(weights(first), weights(second))
    assert results[0].metrics == results[1].metrics and results[0].checkpoint == results[1].checkpoint


def test_a_log_that_lost_lines_is_named(tmp_path: Path) -> None:
    fit(tiny_model(), Batches(Noisy(), 16), cross_entropy, CONFIG, out=tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl has 0 bytes, but \d+ were logged before .* step 12"):
        fit(tiny_model(), Batches(Noisy(), 16), cross_entropy, CONFIG, out=tmp_path, resume=True)


def test_a_checkpoint_of_another_format_is_named(tmp_path: Path) -> None:
    fit(tiny_model(), Batches(Noisy(), 16), cross_entropy, CONFIG, out=tmp_path)
    store = Checkpoints(tmp_path / "checkpoints", 2)
    store.save(13, {**Checkpoints.read(store.paths()[0]), "format": 99})
    with pytest.raises(CheckpointError, match=r"step_00000013.* has checkpoint format 99, expected 1"):
        fit(tiny_model(), Batches(Noisy(), 16), cross_entropy, CONFIG, out=tmp_path, resume=True)


def test_an_output_folder_that_cannot_be_written_is_named_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def never(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError

    with pytest.raises(CheckpointError, match=r"cannot write in .*choose another output folder"):
        fit(tiny_model(), Batches(Noisy(), 16), never, CONFIG, out=tmp_path / "file" / "run")


def test_missing_processes_and_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match=r"devices=2, but 1 process.*torchrun --nproc-per-node=2"):
        fit(tiny_model(), Batches(Noisy(), 16), cross_entropy, with_(devices=2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="torch finds no CUDA device"):
        fit(tiny_model(), Batches(Noisy(), 16), cross_entropy, with_(accelerator="cuda"))


def test_several_processes_need_calibrated_quantizers() -> None:
    model = tiny_model()
    require_calibrated(model, 1)
    with pytest.raises(QuantizationError, match=r"1 quantizers have no range yet, the first is '4\.quantizer'"):
        require_calibrated(model, 2)
    model[4].quantizer.calibrate(model[4].weight.detach())  # type: ignore[operator, union-attr]
    require_calibrated(model, 2)


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny_model(), Batches(Noisy(), 16), cross_entropy, with_(progress=True), evaluate=evaluate, stage="warm")
    shown = capsys.readouterr().out
    assert "warm" in shown and "12/12" in shown and "ETA" in shown
