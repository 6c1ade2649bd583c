"""The plan as data: what it accepts, how rules decide, and that it survives every way of storing it."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbits.errors import FewbitsError, PlanError, nearest
from fewbits.plan import ACTIVATION_BITS, GRANULARITIES, RANGES, WEIGHT_BITS, LayerPlan, Plan, TensorPlan

W4 = LayerPlan(weight=TensorPlan(4))
W8 = LayerPlan(weight=TensorPlan(8))
NAMES = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "fc"]


@st.composite
def tensor_plans(draw: st.DrawFn, bits: tuple[int, ...] = ACTIVATION_BITS) -> TensorPlan:
    granularity = draw(st.sampled_from(GRANULARITIES))
    symmetric = draw(st.booleans())
    return TensorPlan(
        bits=draw(st.sampled_from(bits)),
        quantizer=draw(st.sampled_from(("ste", "lsq", "lsq+"))),
        symmetric=symmetric,
        sparsity=draw(st.sampled_from([None, "2:4", "1:8"])) if symmetric and bits == WEIGHT_BITS else None,
        granularity=granularity,
        block=draw(st.integers(1, 256)) if granularity == "block" else None,
        range=draw(st.sampled_from(RANGES)),
        options=draw(st.dictionaries(st.sampled_from(("narrow", "odd")), st.booleans())),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    maybe = st.none() | tensor_plans()
    layer = st.builds(
        LayerPlan, weight=st.none() | tensor_plans(WEIGHT_BITS), input=maybe, operands=maybe, output=maybe
    )
    rules = draw(st.lists(st.tuples(st.text(max_size=8), st.none() | layer), max_size=5))
    return Plan(
        tuple(rules), draw(st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=2))
    )


@given(plans())
def test_every_way_of_storing_a_plan_gives_it_back(plan: Plan) -> None:
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert copy.deepcopy(plan) == plan and pickle.loads(pickle.dumps(plan)) == plan
    assert hash(copy.deepcopy(plan)) == hash(plan)


def test_a_plan_goes_to_a_file_and_back(tmp_path: Path) -> None:
    plan = Plan((("*", W4), ("fc", None)), {"method": "uniform", "budget": 2.5})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == 1


def test_plain_data_holds_only_what_differs_from_the_defaults() -> None:
    assert TensorPlan(4).to_dict() == {"bits": 4}
    assert TensorPlan(4, granularity="block", block=32).to_dict() == {"bits": 4, "granularity": "block", "block": 32}
    assert LayerPlan(input=TensorPlan(8, symmetric=False)).to_dict() == {"input": {"bits": 8, "symmetric": False}}


def test_plans_are_frozen_and_apart_from_what_they_were_made_of() -> None:
    options = {"narrow": True}
    plan = TensorPlan(4, options=options)
    options["narrow"] = False
    assert plan.options["narrow"] is True
    with pytest.raises(TypeError):
        plan.options["narrow"] = False  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.bits = 8  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plan(()).rules = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0}, r"bits must be one of \(1, .*16\), got 0"),
        ({"bits": 9}, "got 9"),
        ({"bits": "4"}, "got '4'"),
        ({"bits": 4.0}, "got 4.0"),
        ({"bits": True}, "got True"),
        ({"bits": 4, "granularity": "row"}, "granularity must be one of .*'block'.*got 'row'"),
        ({"bits": 4, "range": "max"}, "range must be one of .*'mse'.*got 'max'"),
        ({"bits": 4, "granularity": "block"}, "block=None with granularity='block': give both or neither"),
        ({"bits": 4, "block": 32}, "block=32 with granularity='tensor'"),
        ({"bits": 4, "granularity": "block", "block": 0}, "block must be a whole number from 1, got 0"),
        ({"bits": 4, "granularity": "block", "block": 2.5}, "got 2.5"),
        ({"bits": 4, "symmetric": "no"}, "symmetric must be True or False, got 'no'"),
        ({"bits": 4, "options": 3}, "options must be a mapping"),
    ],
)
def test_a_tensor_plan_outside_the_menu_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        TensorPlan(**fields)


def test_weights_have_at_most_eight_bits_and_activations_may_have_sixteen() -> None:
    assert LayerPlan(input=TensorPlan(16)).input == TensorPlan(16)
    with pytest.raises(PlanError, match=r"weight bits must be one of .*8.*got 16"):
        LayerPlan(weight=TensorPlan(16))


def test_the_last_rule_that_matches_decides() -> None:
    plan = Plan((("*", W8), ("layer1.*", W4), ("fc", None)))
    assert plan.resolve(NAMES) == {
        "conv1": W8, "layer1.0.conv1": W4, "layer1.0.conv2": W4, "layer2.0.conv1": W8, "fc": None,
    }  # fmt: skip
    assert plan.override(("*", None)).resolve(NAMES) == dict.fromkeys(NAMES)
    assert list(plan.override(("conv1", None))) == [*plan.rules, ("conv1", None)]


def test_layers_that_no_rule_names_are_not_decided() -> None:
    assert Plan((("layer?.0.conv1", W4),)).resolve(NAMES) == {"layer1.0.conv1": W4, "layer2.0.conv1": W4}
    assert Plan(()).resolve(NAMES) == {}


def test_an_exact_name_is_no_glob_and_case_counts() -> None:
    names = ["a[0]", "a0"]
    assert Plan((("a[0]", W4),)).resolve(names) == {"a[0]": W4}
    with pytest.raises(PlanError):
        Plan((("CONV1", W4),)).resolve(NAMES)


def test_names_that_only_an_exact_rule_reaches() -> None:
    plan = Plan((("*", W4), ("bn", LayerPlan(output=TensorPlan(8)))))
    assert set(plan.resolve(["conv"], ["bn", "bn2"])) == {"conv", "bn"}


def test_a_rule_that_matches_nothing_lists_near_names() -> None:
    with pytest.raises(PlanError, match=r"'layer1.0.conv3' matches no quantizable layer; did you mean 'layer1.0.conv"):
        Plan((("*", W4), ("layer1.0.conv3", W8))).resolve(NAMES)
    with pytest.raises(PlanError, match=r"'zzz\*' matches no.*the quantizable layers are \['conv1'"):
        Plan((("zzz*", W4),)).resolve(NAMES)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "plan version 'list' is not 1"),
        ({"rules": []}, "plan version None is not 1"),
        ({"version": 2, "rules": []}, "plan version 2 is not 1"),
        ({"version": 1, "rule": []}, "unknown key 'rule' in a plan; did you mean 'rules'"),
        ({"version": 1, "rules": None}, "a plan has a list 'rules'"),
        ({"version": 1, "rules": [], "decided_from": "x"}, "a mapping 'decided_from'"),
        ({"version": 1, "rules": ["fc"]}, r"a rule is a pair \[pattern, layer or null\], got 'fc'"),
        ({"version": 1, "rules": [["fc", {"wight": {"bits": 4}}]]}, "'wight' in a layer plan; did you mean 'weight'"),
        ({"version": 1, "rules": [["fc", 4]]}, "a layer plan is a mapping .*got 4"),
        ({"version": 1, "rules": [["fc", {"weight": 4}]]}, "a tensor plan is a mapping .*got 4"),
        ({"version": 1, "rules": [["fc", {"weight": {"bit": 4}}]]}, "'bit' in a tensor plan; did you mean 'bits'"),
        ({"version": 1, "rules": [["fc", {"weight": {}}]]}, "a tensor plan needs 'bits'"),
    ],
)
def test_damaged_data_is_refused_by_name(data: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(data)


def test_a_rule_must_be_a_layer_plan() -> None:
    with pytest.raises(PlanError, match="the rule for 'fc' must be a LayerPlan, or None for float, got TensorPlan"):
        Plan((("fc", TensorPlan(4)),))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "{", '{"version": 7}', "\x00"])
def test_a_file_that_is_no_plan_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"broken\.json"):
        Plan.load(path)
    with pytest.raises(PlanError, match=r"missing\.json"):
        Plan.load(tmp_path / "missing.json")


def test_errors_are_one_family_and_hints_are_near() -> None:
    assert issubclass(PlanError, FewbitsError)
    assert nearest("wieght", ["weight", "input"]) == "; did you mean 'weight'?"
    assert nearest("qqq", ["weight", "input"]) == ""
