from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.cost import model_shape, size
from fewbits.errors import BudgetError, FewbitsError, PlanError
from fewbits.layers import quantized_layers
from fewbits.plan import Plan
from fewbits.recipes.planning import check_plan, make_plan
from fewbits.tasks.models import CifarResNet, ReferenceCNN
from tests.recipes.runs import small

EXAMPLE = torch.zeros(1, 1, 8, 8)
BATCHES = [(torch.linspace(-2, 2, 512).reshape(8, 1, 8, 8), torch.arange(8))]


def planned(model: torch.nn.Module, example: torch.Tensor = EXAMPLE, **sections: Any) -> Plan:
    return make_plan(model, small(**sections), example, BATCHES)


def test_uniform_bits_spare_the_first_and_the_last_layer() -> None:
    plan = dict(planned(ReferenceCNN(), plan={"weight_bits": 2, "act_bits": 4}))
    bits = [(layer.weight.bits, layer.input.bits) for layer in plan.values()]
    assert bits == [(8, 8), (2, 4), (2, 4), (2, 4), (8, 8)]


@pytest.mark.parametrize("options", [{}, {"sensitivity": "fisher"}])
def test_the_solver_meets_the_budget(options: dict[str, str]) -> None:
    model, budget = ReferenceCNN(), {"size_bytes": 16000}
    plan = planned(model, plan={"method": "solver", "options": options}, budget=budget)
    assert 14000 < size(plan, model_shape(model, EXAMPLE)).total <= 16000
    assert plan.decided_from["method"] == "solver"


def test_a_budget_below_what_is_possible_says_the_least() -> None:
    with pytest.raises(BudgetError, match="least possible is [0-9]"):
        planned(ReferenceCNN(), plan={"method": "solver"}, budget={"size_bytes": 100})


def test_results_are_quantized_by_pattern_and_keep_their_weights() -> None:
    plan = planned(
        CifarResNet(8), torch.zeros(1, 3, 32, 32), plan={"weight_bits": 4, "outputs": ["layer*.bn2", "linear"]}
    )
    outputs = {name: layer for name, layer in plan if layer is not None and layer.output is not None}
    assert sorted(outputs) == ["layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2", "linear"]
    assert outputs["linear"].weight is not None and outputs["linear"].weight.bits == 8
    assert outputs["layer1.0.bn2"].weight is None


def test_results_that_engines_need_quantized_are_found() -> None:
    model, example = CifarResNet(8), torch.zeros(1, 3, 32, 32)
    plan = planned(model, example, plan={"weight_bits": 4, "act_bits": 4, "outputs": "auto", "output_bits": 6})
    outputs = {name: layer.output.bits for name, layer in plan if layer is not None and layer.output is not None}
    found = {"bn1", *(f"layer{i}.0.bn2" for i in (1, 2, 3))}
    assert set(outputs) >= found and set(outputs.values()) == {6}
    assert not any(name.endswith("bn1") and name != "bn1" for name in outputs)
    weights_only = planned(model, example, plan={"weight_bits": 4, "outputs": "auto"})
    assert all(layer is None or layer.output is None for _, layer in weights_only)


def test_a_pattern_of_results_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"plan\.outputs: 'features\.11' matches no layer.*'features\.1"):
        planned(ReferenceCNN(), plan={"weight_bits": 4, "outputs": ["features.11"]})


def test_rules_win_over_the_method_and_may_stand_alone() -> None:
    rule = ["features.3", {"weight": {"bits": 5}}]
    decided = dict(planned(ReferenceCNN(), plan={"weight_bits": 2, "rules": [rule]}))  # the last rule stays
    assert decided["features.3"].weight.bits == 5 and decided["features.6"].weight.bits == 2
    alone = planned(ReferenceCNN(), plan={"method": "explicit", "rules": [rule]})
    assert [name for name, _ in alone] == ["features.3"]


def test_pact_mirrors_where_inputs_are_signed() -> None:
    model, pact = ReferenceCNN(), {"weight_bits": 4, "act_bits": 4, "act_quantizer": "pact"}

    def symmetric(**more: Any) -> list[bool]:
        plan = planned(model, BATCHES[0][0], plan={**pact, **more})
        return [layer.input.symmetric for layer in plan.resolve(model_shape(model).names).values() if layer]

    assert symmetric() == [True, False, False, False, False], "behind the first one all are relu's"
    assert not any(symmetric(rules=[["*", {"input": {"bits": 4, "quantizer": "pact", "symmetric": False}}]]))


def test_a_plan_is_read_from_a_file(tmp_path: Path) -> None:
    plan = planned(ReferenceCNN())
    plan.save(tmp_path / "plan.json")
    again = planned(ReferenceCNN(), plan={"method": "file", "file": str(tmp_path / "plan.json")})
    assert again.rules == plan.rules


@pytest.mark.parametrize(
    "plan",
    [
        {"weight_bits": 9},
        {"weight_bits": 2, "quantizer": "lqs"},
        {"weight_bits": 2, "options": {"sensitivity": "mse"}},
        {"weight_bits": 2, "rules": [["nothing.*", None]]},
    ],
)
def test_what_cannot_be_planned_is_found_out_without_touching_the_model(plan: dict[str, Any]) -> None:
    model = ReferenceCNN()
    with pytest.raises(FewbitsError):
        check_plan(model, small(plan=plan), EXAMPLE, BATCHES)
    check_plan(model, small(), EXAMPLE, BATCHES)
    assert not quantized_layers(model)
