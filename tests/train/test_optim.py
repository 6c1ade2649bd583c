from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fewbits.train import FitConfig, make_optimizer, make_schedule, parameter_groups

from . import workers


class Step(nn.Module):
    is_quantizer = True

    def __init__(self, lr_scale: float | None = None) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.ones(()))
        if lr_scale is not None:
            self.lr_scale = lr_scale


def test_quantizer_parameters_are_apart_and_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), Step(), Step(0.1), Step(0.1))
    groups = parameter_groups(model, 0.5, 0.01)
    assert [g["name"] for g in groups] == ["weights", "quantizers x0.1", "quantizers x1"]
    assert [g["lr"] for g in groups] == [0.5, 0.05, 0.5]
    assert [g["weight_decay"] for g in groups] == [0.01, 0.0, 0.0]
    assert [len(g["params"]) for g in groups] == [4, 2, 1]  # norm and biases are among the decaying weights
    members = [p for g in groups for p in g["params"]]
    assert len(members) == len(set(members)) and set(members) == set(model.parameters())


def test_shared_parameters_are_in_one_group() -> None:
    first, second = Step(), Step()
    second.step = first.step
    groups = parameter_groups(nn.Sequential(first, second), 0.1, 0.1)
    assert [len(g["params"]) for g in groups] == [1]  # and no empty group of weights


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weights_decay_and_quantizers_do_not(name: str) -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), Step())
    weight = model[0].weight.item()
    optimizer = make_optimizer(model, FitConfig(epochs=1, lr=0.1, weight_decay=0.5, optimizer=name))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert model[0].weight.item() == pytest.approx(0.95 * weight, rel=1e-6)
    assert model[1].step.item() == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_schedule_warms_up_and_follows_its_shape(schedule: str) -> None:
    config = FitConfig(max_steps=10, lr=2.0, schedule=schedule, warmup_steps=3)
    optimizer = make_optimizer(nn.Sequential(nn.Linear(1, 1), Step(0.5)), config)
    plan = make_schedule(optimizer, config, 10)
    rates = []
    for _ in range(10):
        rates.append([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        plan.step()
    falls = [1 + math.cos(math.pi * k / 7) if schedule == "cosine" else 2.0 for k in range(7)]
    assert [r[0] for r in rates] == pytest.approx([0.5, 1.0, 1.5, *falls])
    assert [r[1] for r in rates] == pytest.approx([r[0] / 2 for r in rates])


def test_a_quantized_model_trains_in_a_plain_loop() -> None:
    model = workers.tiny_model(dropout=0.0)
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1, 1e-4), momentum=0.9)
    batch = workers.Noisy().gather(torch.arange(96), None)
    losses = []
    for _ in range(60):
        loss = workers.cross_entropy(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
