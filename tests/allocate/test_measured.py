"""Measured sensitivity against quantizing one layer by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbits
from fewbits.allocate import Budget, allocate, measured
from fewbits.errors import DataError, PlanError

MENU = (2, 4, 8)
Batch = tuple[Tensor, Tensor]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(count: int = 2) -> list[Batch]:
    return [(torch.randn(8, 3, 6, 6), torch.randint(0, 5, (8,))) for _ in range(count)]


def test_it_is_the_rise_of_the_loss_with_one_layer_quantized() -> None:
    model, data = net().eval(), batches()
    found = measured(model, data, loss, MENU)
    before = sum(float(loss(model, b).detach()) for b in data) / 2
    for name in ("0", "4"):
        for bits, rise in zip(MENU, found[name], strict=True):
            plan = fewbits.uniform_plan(model, bits, first_last=None).override(("4" if name == "0" else "0", None))
            alone = fewbits.quantize(copy.deepcopy(model), plan, verbose=False)
            layer: Any = alone.get_submodule(name)
            layer.weight_quantizer.calibrate(layer.weight.detach())
            alone.eval()
            after = sum(float(loss(alone, b).detach()) for b in data) / 2
            assert rise == pytest.approx(after - before, abs=1e-6)
    assert abs(found["0"][0]) > 10 * abs(found["0"][2])


def test_the_model_is_as_before_also_where_the_loss_raises() -> None:
    model, calls = net().train(), 0
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def breaks(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        measured(model, batches(), breaks, MENU)
    assert model.training and calls == 5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loss_that_is_not_finite_names_layer_and_width() -> None:
    model = net()
    original = model[4].weight.detach().clone()

    def breaks(model: Any, batch: Batch) -> Tensor:
        return loss(model, batch) * (1 if torch.equal(model[4].weight, original) else float("inf"))

    with pytest.raises(DataError, match="loss of batch 1 is inf with layer '4' at 2 bits"):
        measured(model, batches(), breaks, MENU)
    with pytest.raises(DataError, match="loss of batch 2 is nan in float"):
        first, second = batches()
        measured(model, [first, (second[0] * float("nan"), second[1])], loss, MENU)
    with pytest.raises(DataError, match="measured sensitivity needs at least one batch"):
        measured(model, [], loss, MENU)


def test_the_solver_gives_few_bits_to_the_layer_that_does_not_matter() -> None:
    model, data = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), [(torch.randn(16, 8), torch.arange(16) % 8)]
    with torch.no_grad():
        model[2].weight.mul_(1e-4)  # its bias alone goes on: nothing before it matters
        model[2].bias.normal_()
    options: dict[str, Any] = {"batches": data, "loss": loss, "first_last": None, "menu": MENU}
    plan = allocate(model, Budget(average_bits=3.5), sensitivity="measured", **options)
    found = [layer.weight.bits for _, layer in plan if layer is not None and layer.weight is not None]
    assert found == [2, 2, 2, 8]
    assert plan.decided_from["sensitivity"] == "measured"
    with pytest.raises(PlanError, match=r"drop \['seed'\]"):
        allocate(model, Budget(average_bits=5), sensitivity="measured", seed=1, **options)
