"""Hessian traces against the whole Hessian, and the sensitivity made of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fewbits.allocate import Budget, allocate, hessian, hessian_traces, weight_mse
from fewbits.allocate.hessian import _mean_products
from fewbits.errors import DataError, PlanError

Batch = tuple[Tensor, Tensor]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 3, bias=False)).double()


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(count: int = 2) -> list[Batch]:
    return [(torch.randn(5, 2).double(), torch.randint(0, 3, (5,))) for _ in range(count)]


def exact(model: nn.Module, data: list[Batch]) -> list[float]:
    """Return the trace of each layer's block of autograd's own Hessian, mean over the batches."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def value(own: dict[str, Tensor], batch: Batch) -> Tensor:
        return F.cross_entropy(functional_call(model, own, (batch[0],)), batch[1])

    blocks = [torch.func.hessian(value)(weights, batch) for batch in data]
    return [sum(float(b[n][n].reshape(weights[n].numel(), -1).trace()) for b in blocks) / len(blocks) for n in weights]


def test_over_all_sign_vectors_the_mean_is_the_trace() -> None:
    model, (batch,) = net(), batches(1)
    weights = list(model.parameters())
    signs = []
    for vector in itertools.product((-1.0, 1.0), repeat=10):
        first, second = torch.tensor(vector).double().split([4, 6])
        signs.append([first.reshape(2, 2), second.reshape(3, 2)])
    found = _mean_products(loss(model, batch), weights, signs)
    assert found.tolist() == pytest.approx(exact(model, [batch]), rel=1e-9)


def test_many_probes_come_near_to_the_trace() -> None:
    model, data = net(), batches()
    found = hessian_traces(model, data, loss, probes=1500)
    assert list(found.values()) == pytest.approx(exact(model, data), rel=0.2)
    few = hessian_traces(model, data, loss, probes=3)
    assert few == hessian_traces(model, data, loss, probes=3) != hessian_traces(model, data, loss, probes=3, seed=1)


def test_the_sensitivity_is_half_the_mean_eigenvalue_times_the_squared_error() -> None:
    model, data = net().float(), [(x.float(), y) for x, y in batches()]
    traces, errors = hessian_traces(model, data, loss, probes=3), weight_mse(model, (2, 4), relative=False)
    found = hessian(model, data, loss, (2, 4), probes=3)
    assert list(found) == ["0", "2"]
    for name, count in (("0", 4), ("2", 6)):
        assert found[name] == pytest.approx([max(traces[name], 0) / count * e / 2 for e in errors[name]])
    assert max(map(max, found.values())) > 0


def test_a_loss_without_curvature_has_none() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    assert hessian_traces(model, batches_float(), lambda m, b: m(b[0]).sum()) == {"0": 0.0}
    concave = hessian(model, batches_float(), lambda m, b: -m(b[0]).square().sum(), (2,))
    assert concave == {"0": [0.0]}


def batches_float() -> list[Batch]:
    return [(x.float(), y) for x, y in batches()]


def test_fused_attention_and_frozen_weights_are_no_obstacle_and_the_model_stays_as_it_was() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.out, self.norm = nn.Linear(4, 4), nn.Linear(4, 3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inside(x)
            out: Tensor = self.norm(self.out(F.scaled_dot_product_attention(x, x, x)).mean(1))
            return out

    model = Attends().train()
    model.inside.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [(torch.randn(4, 5, 4), torch.randint(0, 3, (4,)))]
    found = hessian_traces(model, data, loss)
    assert set(found) == {"inside", "out"} and all(found.values())
    assert model.training and not model.inside.weight.requires_grad and model.out.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_solver_takes_it_and_says_what_is_missing() -> None:
    model, data = net().float(), batches_float()
    options: dict[str, Any] = {"first_last": None, "sensitivity": "hessian"}
    plan = allocate(model, Budget(average_bits=4), batches=data, loss=loss, probes=2, seed=5, **options)
    assert plan.decided_from["sensitivity"] == "hessian" and plan.decided_from["predicted"]["average_bits"] <= 4
    with pytest.raises(PlanError, match="'hessian' needs batches= and loss="):
        allocate(model, Budget(average_bits=4), batches=data, **options)
    with pytest.raises(PlanError, match=r"'fisher' draws nothing by chance: drop \['probes'\]"):
        allocate(model, Budget(average_bits=4), sensitivity="fisher", batches=data, loss=loss, probes=2)
    with pytest.raises(DataError, match="at least one batch"):
        allocate(model, Budget(average_bits=4), batches=[], loss=loss, **options)
    with pytest.raises(DataError, match="probes must be a whole number from 1, got 0"):
        allocate(model, Budget(average_bits=4), batches=data, loss=loss, probes=0, **options)
    with pytest.raises(DataError, match="loss of batch 1 is nan"):
        allocate(model, Budget(average_bits=4), batches=data, loss=lambda m, b: loss(m, b) * float("nan"), **options)
