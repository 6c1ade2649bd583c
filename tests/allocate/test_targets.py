"""Budgets with several targets: hardware limits and accuracy floors, and the methods that take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.allocate import Budget, allocate, fisher
from fewbits.cost import Hardware, hardware_cost, model_shape, plan_cycles
from fewbits.errors import BudgetError, HardwareError, PlanError, QuantizationError
from fewbits.plan import Plan
from tests.allocate.searching import BATCHES, Accuracy, bits_of, deep, disturb, searched

GIVEN: dict[str, Any] = {"example": BATCHES[0], "first_last": None, "act_bits": 8, "menu": (2, 4, 6, 8)}


def on_hardware(plan: Plan, name: str) -> dict[str, float]:
    model = deep()
    hardware = Hardware.load(name)
    cycles = plan_cycles(model, plan) if hardware.measures_cycles else None
    found = hardware_cost(plan, model_shape(model, BATCHES[0]), hardware, cycles)
    return {"energy_uj": found.compute_energy + found.memory_energy, "latency_ms": found.latency}


def uniform(bits: int, hardware: str) -> dict[str, float]:
    plan = allocate(deep(), Budget(average_bits=bits), method="uniform", **{**GIVEN, "menu": (bits,)})
    return on_hardware(plan, hardware)


@pytest.mark.parametrize("method", ["solver", "sigma", "uniform"])
@pytest.mark.parametrize(("limit", "hardware"), [("energy_uj", "shift_add"), ("latency_ms", "shift_add"),
                                                 ("energy_uj", "npu")])  # fmt: skip
def test_limits_on_hardware_are_met_and_used(method: str, limit: str, hardware: str) -> None:
    low, high = uniform(2, hardware)[limit], uniform(8, hardware)[limit]
    middle = (low + high) / 2
    assert low < high
    plan = allocate(deep(), Budget(**{limit: middle, "hardware": hardware}), method=method, **GIVEN)
    spent = on_hardware(plan, hardware)[limit]
    assert low < spent <= middle * (1 + 1e-9)
    assert plan.decided_from["predicted"][limit] == pytest.approx(spent)
    assert plan.decided_from["budget"] == {limit: middle, "hardware": hardware}
    with pytest.raises(BudgetError, match=rf"{limit}=.*the least possible is"):
        allocate(deep(), Budget(**{limit: low * 0.9, "hardware": hardware}), method=method, **GIVEN)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"energy_uj": 1.0}, "energy_uj needs hardware="),
        ({"size_mb": 1.0, "hardware": "npu"}, "hardware='npu' without a limit on it"),
        ({"accuracy": 101}, "accuracy is in percent, from 0 to 100, got 101"),
        ({"accuracy_drop": -1}, "accuracy_drop is in percent"),
        ({"accuracy_drop": 1, "reference": "int4"}, "reference must be one of .*got 'int4'; did you mean 'int8'"),
        ({"size_mb": 1, "reference": "int8"}, "is what accuracy_drop counts from"),
        ({"latency_ms": 0, "hardware": "npu"}, "latency_ms must be a positive number, got 0"),
    ],
)
def test_bad_targets(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**given)


def test_hardware_that_is_not_there_or_has_no_example(tmp_path: Path) -> None:
    budget = Budget(energy_uj=1.0, hardware="shift_ad")
    with pytest.raises(HardwareError, match="shift_add"):
        allocate(deep(), budget, **GIVEN)
    with pytest.raises(BudgetError, match="a budget of energy_uj needs an example"):
        allocate(deep(), Budget(energy_uj=1.0, hardware="npu"))


def test_all_targets_together_hold_in_a_search() -> None:
    low, high = uniform(2, "shift_add")["energy_uj"], uniform(8, "shift_add")["energy_uj"]
    budget = Budget(energy_uj=0.5 * (low + high), hardware="shift_add", average_bits=5.5, bops=1e9, accuracy=75.0)
    result = searched(budget, steps=20, activations=False)
    assert result.status == "ok" and result.accuracy >= 75
    assert set(result.log["buffers"]) == {"accuracy", "average_bits", "bops", "energy_uj"}
    assert not budget.exceeded(result.costs)
    assert on_hardware(result.plan, "shift_add")["energy_uj"] <= 0.5 * (low + high)


@pytest.mark.parametrize("method", ["solver", "uniform", "random"])
def test_methods_that_measure_nothing_refuse_a_floor_and_name_one_that_does(method: str) -> None:
    with pytest.raises(BudgetError, match=rf"method '{method}' weighs costs alone.*\['sigma.*finetune="):
        allocate(deep(), Budget(average_bits=4, accuracy_drop=1), method=method)


def test_sigma_without_training_meets_the_limit_and_spends_it() -> None:
    for limit in (2.0, 3.0, 5.0, 8.0):
        plan = allocate(deep(), Budget(average_bits=limit), method="sigma", **GIVEN)
        told = plan.decided_from
        assert told["predicted"]["average_bits"] <= limit and told["status"] == "untrained"
        bits = [layer.weight.bits for _, layer in plan if layer is not None and layer.weight is not None]
        assert set(bits) <= {2, 4, 6, 8}
        if limit in (2.0, 8.0):
            assert set(bits) == {int(limit)}
    plain = allocate(deep(), Budget(average_bits=4), method="sigma", kl="plain", rank="next", alpha=0.5, **GIVEN)
    assert plain.decided_from["settings"]["kl"] == "plain"


def test_sigma_without_training_can_move_inputs_given_data() -> None:
    most = allocate(deep(), Budget(bops=1e12), method="sigma", **GIVEN).decided_from["predicted"]["bops"]
    budget = Budget(bops=0.2 * most)
    plan = allocate(deep(), budget, method="sigma", calibration=BATCHES, **GIVEN)
    assert plan.decided_from["predicted"]["bops"] <= 0.2 * most
    assert {layer.input.bits for _, layer in plan if layer is not None and layer.input is not None} != {8}
    stacked = allocate(deep(), budget, method="sigma", calibration=torch.stack(BATCHES), **GIVEN)
    assert stacked.rules == plan.rules
    with pytest.raises(QuantizationError, match="input of layer '0' has NaN or Inf in the calibration batches"):
        allocate(deep(), budget, method="sigma", calibration=[torch.full((4, 6), float("nan"))], **GIVEN)
    with pytest.raises(BudgetError, match=r"bops=.*least possible"):  # weights alone cannot come so low
        allocate(deep(), budget, method="sigma", **GIVEN)


def test_allocate_searches_where_it_can_train(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **GIVEN, "finetune": disturb, "evaluate": Accuracy(), "calibration": BATCHES, "state": tmp_path,
        "epochs_reference": 1, "epochs_cluster": 1, "epochs_refine": 1, "steps": 2,
    }  # fmt: skip
    plan = allocate(deep(), Budget(average_bits=5, accuracy_drop=10), method="sigma", **options)
    assert plan.decided_from["status"] == "ok" and (tmp_path / "search.pt").is_file()
    with pytest.warns(UserWarning, match="out of reach: accuracy is"):
        options["state"] = None
        options["evaluate"] = Accuracy(scale=90.0)
        allocate(deep(), Budget(average_bits=2.2, accuracy=89.5), method="sigma", **options)
    with pytest.raises(PlanError, match="needs all three"):
        allocate(deep(), Budget(average_bits=4), method="sigma", finetune=disturb)
    with pytest.raises(PlanError, match=r"\['steps'\] .* a search"):
        allocate(deep(), Budget(average_bits=4), method="sigma", steps=3)
    with pytest.raises(PlanError, match=r"\['state'\] are for a search"):
        allocate(deep(), Budget(average_bits=4), method="sigma", state=tmp_path)
    with pytest.raises(BudgetError, match="can only be held by a search"):
        allocate(deep(), Budget(average_bits=4, accuracy=80), method="sigma")
    with pytest.raises(PlanError, match="no option 'patiense'; did you mean 'patience'"):
        allocate(deep(), Budget(average_bits=4), method="sigma", patiense=3)


@pytest.mark.parametrize("scale2", ["absmax", "mse", "learned"])
def test_two_bits_may_be_ternary(scale2: str) -> None:
    import fewbits

    plan = allocate(deep(), Budget(average_bits=2), method="sigma", scale2=scale2, **GIVEN)
    model = fewbits.quantize(deep(), plan, verbose=False)
    assert set(bits_of(model).values()) == {2}
    for layer in (m for m in model if hasattr(m, "weight_quantizer")):
        weight = layer.weight_quantizer(layer.weight.detach())
        codes = layer.weight_quantizer.encode(layer.weight.detach()).values
        assert set(codes.unique().tolist()) <= {-1, 0, 1}
        if scale2 == "absmax":
            assert weight.abs().amax(1).equal(layer.weight.detach().abs().amax(1))
    assert any(p.requires_grad for n, p in model.named_parameters() if "weight_quantizer" in n) == (scale2 == "learned")
    odd = fewbits.quantize(
        deep(), allocate(deep(), Budget(average_bits=2), method="sigma", **GIVEN), verbose=False
    )  # as the style has it: {-3, -1, 1, 3}
    assert -3 in odd[0].weight_quantizer.encode(odd[0].weight.detach()).values


def squared(model: Any, batch: Any) -> Any:
    return model(batch).square().mean()


def test_sigma_fisher_meets_all_limits_by_what_the_loss_feels() -> None:
    model, options = deep(), {**GIVEN, "batches": BATCHES, "loss": squared}
    with torch.no_grad():
        model[3].weight.zero_()  # no error at any width, and nothing before it matters
    plan = allocate(model, Budget(average_bits=4, size_bytes=10**6), method="sigma_fisher", **options)
    bits = {name: layer.weight.bits for name, layer in plan if layer is not None and layer.weight is not None}
    assert bits["0"] == bits["3"] == 2 and max(bits.values()) > 4
    assert plan.decided_from["predicted"]["average_bits"] <= 4 and plan.decided_from["method"] == "sigma_fisher"
    rise = fisher(model, BATCHES, squared, (2, 4, 6, 8))
    exact = allocate(model, Budget(average_bits=4), sensitivity="fisher", **options)
    spent = sum(rise[name][b // 2 - 1] for name, b in bits.items())
    assert spent <= 1.5 * exact.decided_from["distortion"], "near the exact solver, which takes one limit"


def test_a_search_by_fisher_information() -> None:
    budget = Budget(average_bits=4, accuracy_drop=2)
    result = searched(budget, loss=squared, batches=BATCHES, steps=4)
    assert result.log["method"] == result.plan.decided_from["method"] == "sigma_fisher"
    start = next(entry for entry in result.log["steps"] if entry["phase"] == "cluster")
    assert 3 < start["costs"]["average_bits"] <= 4, "it starts within the limit, and spends it"
    with pytest.raises(PlanError, match=r"\['kl'\] are of clusters and divergence"):
        searched(budget, loss=squared, batches=BATCHES, kl="spread")
    with pytest.raises(PlanError, match="give both or neither"):
        searched(budget, loss=squared)
    with pytest.raises(PlanError, match="'sigma_fisher' needs batches= and loss="):
        allocate(deep(), Budget(average_bits=4), method="sigma_fisher")
