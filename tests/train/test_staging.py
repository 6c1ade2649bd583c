"""The acceptance of the curriculum: what is frozen, what is exact, what is calibrated, and with which optimizer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.allocate import uniform_plan
from fewbits.errors import TrainingError
from fewbits.layers import calibrate, quantize, quantized_layers
from fewbits.layers.base import activation_quantizers
from fewbits.train import Curriculum, Hook, Stage, Staged, TrainState, fit

from . import staged as s


class Look(Hook):
    """Notes what is trained, by which optimizer, and to what."""

    def __init__(self) -> None:
        self.stages: list[tuple[int, str]] = []
        self.groups: list[list[dict[str, Any]]] = []
        self.optimizers: list[Any] = []
        self.fresh: list[bool] = []
        self.states: list[dict[str, Tensor]] = []
        self.gradients: list[set[str]] = []
        self.rates: list[list[float]] = []

    def on_stage_change(self, state: TrainState, stage: str) -> None:
        self.stages.append((state.step, stage))
        self.optimizers.append(state.optimizer)
        self.fresh.append(not state.optimizer.state)
        self.groups.append([{k: v for k, v in g.items() if k != "params"} for g in state.optimizer.param_groups])

    def after_backward(self, state: TrainState) -> None:
        self.rates.append([g["lr"] for g in state.optimizer.param_groups])
        named = state.model.named_parameters()
        self.gradients.append({n for n, p in named if p.grad is not None and bool(p.grad.abs().sum() > 0)})

    def after_step(self, state: TrainState) -> None:
        self.states.append(tensors(state.model))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {n for n in before if not torch.equal(before[n], after[n])}


def test_the_first_stage_leaves_the_tail_alone_and_learns_through_it() -> None:
    model, look = s.quantized(), Look()
    before = tensors(model)
    fit(model, s.batches(), s.cross_entropy, s.config(), stages=s.staged(), hooks=[look])
    assert look.stages == [(0, "backbone"), (3, "head")]  # 9 steps
    in_first = changed(before, look.states[2])
    assert not {name for name in in_first if name.startswith("head")}
    assert {"backbone.first.0.weight", "backbone.second.1.running_mean", "backbone.second.1.weight"} <= in_first
    assert all("backbone.first.0.weight" in g and not any(n.startswith("head") for n in g) for g in look.gradients[:3])
    in_second = changed(look.states[2], look.states[-1])
    assert {"backbone.first.0.weight", "head.0.weight", "head.1.running_mean", "head.6.bias"} <= in_second


def test_a_layer_that_is_not_reached_is_exactly_the_float_one() -> None:
    net = s.float_net()
    model, x = s.quantized(net), s.Blobs().x[:8]
    stages = s.staged()
    stages.start(model, 9, s.cross_entropy)
    stages.enter(0)
    features = torch.randn(4, 8, 6, 6)
    assert not model.head[1].training and model.backbone.first[1].training and model.head[5].training
    assert torch.equal(model.eval().head(features), net.eval().head(features))
    stages.calibrate(0, lambda batch: batch)
    assert not torch.equal(model(x), net(x)), "the backbone is quantized"
    stages.leave()
    assert {layer.mode for layer in quantized_layers(model).values()} == {"quantize"}
    assert all(p.requires_grad for p in model.parameters())


def test_each_stage_calibrates_what_it_adds_with_the_rest_quantized() -> None:
    model = s.quantized()
    stages = s.staged()
    stages.start(model, 9, s.cross_entropy)
    stages.enter(0)
    stages.calibrate(0, lambda batch: batch)
    layers = quantized_layers(model)
    calibrated = {n for n, layer in layers.items() if all(q.calibrated for q in activation_quantizers(layer))}
    assert calibrated == {"backbone.first.0", "backbone.second.0"}
    before = tensors(model)
    by_hand = copy.deepcopy(model)
    stages.enter(1)
    stages.calibrate(1, lambda batch: batch)
    moved = changed(before, tensors(model))
    assert moved and all(name.startswith("head") and "input_quantizer" in name for name in moved)

    tail = by_hand.head
    for layer in quantized_layers(by_hand).values():
        layer.mode = "quantize"
    with torch.no_grad():
        by_hand.eval()
        given = [by_hand.backbone(x)[-1] for x in s.calibration()]
    calibrate(tail, given)
    ours, theirs = tensors(model.head), tensors(tail)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_stage_has_a_fresh_optimizer_and_quantizers_their_own_rate() -> None:
    model, look = s.quantized(), Look()
    config = s.config(optimizer="adamw", lr=0.01, quantizer_lr=0.1, weight_decay=0.05, decay_all=False)
    fit(model, s.batches(), s.cross_entropy, config, stages=s.staged(), hooks=[look])
    assert look.optimizers[0] is not look.optimizers[1] and look.fresh == [True, True]
    for groups in look.groups:
        found = {g["name"]: (g["initial_lr"], g["weight_decay"]) for g in groups}
        assert found["weights"] == (0.01, 0.05) and found["norms and biases"] == (0.01, 0.0)
        assert found["quantizers x0.1"] == (pytest.approx(0.001), 0.0)
    assert [r[0] for r in look.rates[:4]] == pytest.approx([0.01, 0.0075, 0.0025, 0.01]), "a cosine of its own"
    counts = [sum(len(g["params"]) for g in o.param_groups) for o in look.optimizers]
    assert counts[0] == sum(1 for n, _ in model.named_parameters() if n.startswith("backbone"))
    assert counts[1] == sum(1 for _ in model.parameters())


def test_the_data_go_on_as_they_would_without_stages() -> None:
    def seen(stages: Staged | None) -> list[list[int]]:
        labels: list[list[int]] = []

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            labels.append(batch[0][:, 0, 0, 0].tolist())
            return s.cross_entropy(model, batch)

        fit(s.quantized(), s.batches(), loss, s.config(epochs=2), stages=stages)
        return labels

    assert seen(s.staged()) == seen(None)


def test_norms_can_stay_frozen_and_so_can_a_module() -> None:
    stages = [Stage(["backbone.second"], 0.5), Stage(["head"], 0.5)]
    model = s.float_net()
    quantize(model, uniform_plan(model, 4, 4, first_last=None).override(("backbone.first.0", None)), verbose=False)
    model.head[6].bias.requires_grad_(False)
    before = tensors(model)
    curriculum = Curriculum(stages, norms="frozen", frozen=["backbone.first"])
    fit(model, s.batches(), s.cross_entropy, s.config(), stages=s.staged(curriculum))
    after = changed(before, tensors(model))
    assert not {n for n in after if "running" in n or n.startswith("backbone.first")} and "head.1.weight" in after
    assert "head.6.bias" not in after and not model.head[6].bias.requires_grad, "frozen before, frozen after"
    assert all(p.requires_grad for n, p in model.named_parameters() if n != "head.6.bias")


def test_the_average_of_a_quantizer_starts_with_its_stage() -> None:
    model, look = s.quantized(), Look()
    averages: list[dict[str, Tensor]] = []

    class Average(Hook):
        def after_step(self, state: TrainState) -> None:
            averages.append({n: v.clone() for n, v in state.ema.state_dict().items()})  # type: ignore[union-attr]

    fit(model, s.batches(), s.cross_entropy, s.config(ema=0.5), stages=s.staged(), hooks=[look, Average()])
    new = [n for n in averages[3] if n.startswith("head") and "quantizer" in n]
    assert new and all(torch.equal(averages[3][n], look.states[3][n]) for n in new)
    name = "backbone.first.0.weight"
    torch.testing.assert_close(averages[3][name], (averages[2][name] + look.states[3][name]) / 2)
    torch.testing.assert_close(model.state_dict()[new[0]], averages[-1][new[0]])


def test_the_log_tells_the_stage(tmp_path: Path) -> None:
    fit(s.quantized(), s.batches(), s.cross_entropy, s.config(), stages=s.staged(), out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["curriculum/stage"] for line in lines] == [1, 1, 1, 2, 2, 2, 2, 2, 2]


def test_what_cannot_be_staged_is_refused_and_the_model_comes_back() -> None:
    with pytest.raises(TrainingError, match="has no quantized layer"):
        fit(s.float_net(), s.batches(), s.cross_entropy, s.config(), stages=s.staged())
    with pytest.raises(TrainingError, match="needs batches that calibrate"):
        Staged(s.TWO, [])
    with pytest.raises(TrainingError, match=r"names the terms \['feat'\]: give Staged a loss="):
        one = Curriculum([Stage([""], 1.0, ["feat"])])
        fit(s.quantized(), s.batches(), s.cross_entropy, s.config(), stages=s.staged(one))

    def broken(model: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("no loss")

    model = s.quantized()
    with pytest.raises(RuntimeError, match="no loss"):
        fit(model, s.batches(), broken, s.config(), stages=s.staged())
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())
    assert {layer.mode for layer in quantized_layers(model).values()} == {"quantize"}
