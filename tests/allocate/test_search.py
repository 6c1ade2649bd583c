"""The search: it ends, keeps to its menu, tells what it missed, and goes back to the bit."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewbits.allocate import Budget, Problem, SearchResult, SearchSettings, sigma_search
from fewbits.allocate.goal import Goal
from fewbits.allocate.layout import Item, Layout
from fewbits.allocate.rankers import ByDivergence
from fewbits.allocate.search import STATUSES, Search, next_move
from fewbits.allocate.search_state import SearchFolder
from fewbits.allocate.subject import Subject, refresh_norms
from fewbits.cost import model_shape
from fewbits.cost.hardware import FOLDER
from fewbits.errors import BudgetError, CheckpointError, PlanError, QuantizationError, SearchError
from fewbits.layers import calibrate, quantize
from tests.allocate.searching import BATCHES, FREE, SHORT, Accuracy, bits_of, deep, disturb, equal_states, searched

MENU = (2, 4, 6, 8)


class Killed(BaseException):
    """What a kill looks like from inside: nothing may catch it."""


def steps(result: SearchResult) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in result.log["steps"]]


@pytest.mark.parametrize("seed", range(4))
def test_it_ends_within_its_steps_in_the_menu_and_never_tries_bits_twice(seed: int) -> None:
    budget = Budget(average_bits=3.5 + 0.2 * seed, accuracy_drop=1.0 + seed)
    accuracy = Accuracy(seed)
    result = searched(budget, accuracy, model=deep(seed=seed))
    log = result.log["steps"]
    assert result.status in STATUSES
    assert sum(entry["phase"] == "refine" for entry in log) <= SHORT["steps"]
    tried = [tuple(entry["bits"].values()) for entry in log]
    assert len(set(tried)) == len(tried)
    assert {b for bits in tried for b in bits} <= set(MENU)
    assert (result.status == "ok") == (not result.missed)
    assert json.loads(json.dumps(result.log)) == result.log
    stable = next(entry for entry in reversed(log) if entry["stable"])
    assert bits_of(result.model) == stable["bits"] and result.accuracy == stable["accuracy"]
    if result.status == "ok":
        floor = result.log["accuracies"]["int8"] - 1.0 - seed
        assert result.accuracy >= floor and result.costs["average_bits"] <= 3.5 + 0.2 * seed


def test_targets_that_hold_are_found_and_the_plan_tells_so() -> None:
    result = searched(Budget(average_bits=5.5, accuracy_drop=4.0))
    assert result.status == "ok" and result.message == "ok: every target holds"
    told = result.plan.decided_from
    assert (told["method"], told["status"], told["missed"]) == ("sigma", "ok", {})
    assert told["predicted"]["average_bits"] == result.costs["average_bits"] <= 5.5
    fresh = quantize(deep(), result.plan, verbose=False)
    assert bits_of(fresh) == bits_of(result.model)
    assert not any(isinstance(m, nn.Linear) and hasattr(m, "layer_plan") for m in deep().modules())


def test_what_is_out_of_reach_is_told_and_the_nearest_plan_is_left_to_the_bit() -> None:
    accuracy = Accuracy(scale=60.0)
    result = searched(Budget(average_bits=2.2, accuracy=89.9), accuracy)
    assert result.status in ("abandon", "exhausted", "max_steps")
    assert set(result.missed) & {"accuracy", "average_bits"}
    for name, missed in result.missed.items():
        assert missed["distance"] == pytest.approx(abs(missed["value"] - missed["target"])) and missed["distance"] > 0
        assert f"{name} is" in result.message
    log = result.log["steps"]
    nearest = max(i for i, entry in enumerate(log) if entry["stable"])
    refined = [entry["distance"] for entry in log[nearest:]]
    assert min(refined) == refined[0]
    assert nearest < len(log) - 1, "the search went further, and came back"
    assert equal_states(result.model.state_dict(), accuracy.states[nearest])


def test_a_generous_budget_is_met_by_8_bits_at_once() -> None:
    result = searched(Budget(average_bits=8))
    assert result.status == "ok" and len(result.log["steps"]) == 1
    assert set(bits_of(result.model).values()) == {8}


@pytest.mark.parametrize("calls", [1, 2, 3, 5, 7])
def test_a_search_that_is_killed_goes_on_and_ends_equal(tmp_path: Path, calls: int) -> None:
    budget = Budget(average_bits=3.4, accuracy_drop=1.5)
    whole = searched(budget, epochs_refine=2)

    def kill(call: int) -> None:
        if call == calls:
            raise Killed

    with pytest.raises(Killed):
        searched(budget, Accuracy(fails=kill), epochs_refine=2, state=tmp_path)
    torch.randn(3)
    resumed = searched(budget, Accuracy(), epochs_refine=2, state=tmp_path)
    assert steps(resumed) == steps(whole) and resumed.status == whole.status
    assert equal_states(resumed.model.state_dict(), whole.model.state_dict())
    assert resumed.plan.rules == whole.plan.rules
    again = Accuracy()
    assert steps(searched(budget, again, epochs_refine=2, state=tmp_path)) == steps(whole) and not again.calls
    assert json.loads((tmp_path / "search.json").read_text())["status"] == whole.status


def test_nan_and_errors_are_passed_on_with_the_step_and_the_state_is_kept(tmp_path: Path) -> None:
    budget = Budget(average_bits=3.4, accuracy_drop=1.5)

    def breaks(call: int) -> None:
        if call == 3:
            raise ValueError("no more memory")

    with pytest.raises(
        SearchError, match=r"evaluate raised ValueError at step 2 \(refine 1\).*no more memory"
    ) as caught:
        searched(budget, Accuracy(fails=breaks), state=tmp_path, rounds=1)
    assert isinstance(caught.value.__cause__, ValueError)
    assert [entry["phase"] for entry in caught.value.log] == ["reference", "cluster"]
    nan = Accuracy(fails=lambda call: math.nan)
    with pytest.raises(SearchError, match=r"evaluate returned nan at step 2 \(refine 1\).*2 steps were done.*go on"):
        searched(budget, nan, state=tmp_path, rounds=1)
    assert steps(searched(budget, state=tmp_path, rounds=1)) == steps(searched(budget, rounds=1))

    def explode(model: nn.Module, epochs: int) -> None:
        raise RuntimeError("boom")

    with pytest.raises(SearchError, match=r"finetune raised RuntimeError at step 0 \(reference 1\).*state=FOLDER"):
        searched(budget, finetune=explode)


def test_what_fails_beside_the_functions_tells_the_step_and_keeps_the_state(tmp_path: Path) -> None:
    budget, trained = Budget(average_bits=3.4, accuracy_drop=1.5), list[int]()

    def diverge(model: nn.Module, epochs: int) -> None:
        disturb(model, epochs)
        trained.append(epochs)
        if len(trained) == 2:
            model.get_submodule("3").weight.data[0, 0] = math.nan

    with pytest.raises(
        SearchError, match=r"weight of layer '3' has NaN.* at step 1 \(cluster 1\).*1 steps were done; .* go on from it"
    ) as caught:
        searched(budget, finetune=diverge, state=tmp_path)
    assert isinstance(caught.value.__cause__, QuantizationError) and len(caught.value.log) == 1
    assert steps(searched(budget, state=tmp_path)) == steps(searched(budget))
    for batch, message in ((torch.zeros(4, 7), "RuntimeError at step 0"), (torch.full((4, 6), math.nan), "layer '0'")):
        with pytest.raises(SearchError, match=f"calibration raised .*{message}"):
            sigma_search(deep(), budget, disturb, Accuracy(), [batch], style=FREE)


def test_a_folder_of_another_search_is_refused(tmp_path: Path) -> None:
    searched(Budget(average_bits=8), state=tmp_path)
    with pytest.raises(CheckpointError, match="written by another search: targets was"):
        searched(Budget(average_bits=7), state=tmp_path)
    with pytest.raises(CheckpointError, match="settings was"):
        searched(Budget(average_bits=8), state=tmp_path, kl="plain")
    with pytest.raises(CheckpointError, match="sigmas was"):
        searched(Budget(average_bits=8), state=tmp_path, model=deep(seed=1), layers=9)
    (tmp_path / "search.pt").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="cannot be read.*delete it"):
        searched(Budget(average_bits=8), state=tmp_path)
    for other, message in (([1], "has format None"), ({"format": 1}, "is no state of a search .*'reference'")):
        torch.save(other, tmp_path / "search.pt")
        with pytest.raises(CheckpointError, match=f"search.pt {message}.*delete it"):
            searched(Budget(average_bits=8), state=tmp_path)


def test_a_folder_is_refused_where_hardware_or_example_changed(tmp_path: Path) -> None:
    text, file = (FOLDER / "int8_mac.yaml").read_text(), tmp_path / "mine.yaml"
    file.write_text(text)
    budget = Budget(latency_ms=1e3, hardware=str(file))
    searched(budget, state=tmp_path / "state")
    assert "clock_mhz: 600" in text
    file.write_text(text.replace("clock_mhz: 600", "clock_mhz: 300"))
    with pytest.raises(CheckpointError, match="another search: latency_ms of INT8 was .*, now "):
        searched(budget, state=tmp_path / "state")
    searched(Budget(bops=1e12), state=tmp_path / "bops")
    with pytest.raises(CheckpointError, match="another search: bops of INT8 was .*, now "):
        searched(Budget(bops=1e12), state=tmp_path / "bops", example=BATCHES[0][:2])


def test_a_folder_that_cannot_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    accuracy, trained = Accuracy(), list[int]()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="cannot write the state of the search to .*choose another folder"):
            searched(Budget(average_bits=4), accuracy, state=path, finetune=lambda model, n: trained.append(n))
    assert accuracy.calls == 0 and not trained


class Toy:
    """A subject that is its bits: nothing is trained, so that many searches are quick."""

    def __init__(self, layout: Layout, seed: int) -> None:
        self.layout, self.model, self.calibration, self.where = layout, layout.problem.model, BATCHES, ""
        generator = torch.Generator().manual_seed(seed)
        self.weight = [3.0 * float(torch.rand((), generator=generator)) ** 2 for _ in layout.items]
        self.bits: list[int] = []

    def apply(self, bits: list[int]) -> None:
        self.bits = list(bits)

    def refresh(self) -> None: ...

    def cycle(self, *args: Any, **kwargs: Any) -> tuple[float, int]:
        return 90 - sum(w * 2.0 ** (2 - b) for w, b in zip(self.weight, self.bits)), 1

    def snapshot(self) -> dict[str, Any]:
        return {}

    def restore(self, bits: list[int], snapshot: dict[str, Any]) -> None:
        self.apply(bits)


def toy_search(seed: int, budget: Budget, **settings: Any) -> Search:
    model = deep(14, seed)
    layout = Layout(Problem(model, model_shape(model), budget, MENU, FREE))
    chosen = SearchSettings(**settings)
    ranker = ByDivergence(layout, chosen, [])
    search = Search(Toy(layout, seed), layout, ranker, chosen, SearchFolder(None), {})  # type: ignore[arg-type]
    search.run()
    return search


def test_many_searches_end_and_skipping_layers_that_break_the_limit_meets_more_targets() -> None:
    met = {True: 0, False: 0}
    for seed in range(6):
        for fit in met:
            search = toy_search(seed, Budget(average_bits=4, accuracy_drop=4), size_fit=fit)
            state = search.state
            met[fit] += state.status == "ok"
            assert state.status in STATUSES and state.steps <= 40
            assert len({tuple(bits) for bits in state.seen}) == len(state.seen)
    assert met[True] > met[False], met


def test_more_equal_clusters_where_both_sides_are_far_off() -> None:
    class Never(Accuracy):
        def __call__(self, model: nn.Module) -> float:
            return 90.0 if set(bits_of(model).values()) == {8} else super().__call__(model) * 0 + 10.0

    result = searched(Budget(average_bits=2.1, accuracy_drop=1.0), Never(), rounds=3, steps=0, layers=14)
    clusters = [entry for entry in result.log["steps"] if entry["phase"] == "cluster"]
    assert [entry["penalty"] for entry in clusters] == pytest.approx([0.1 * i for i in range(len(clusters))])
    assert len(clusters) > 1 and clusters[0]["region"] == "iteration" and clusters[-1]["region"] == "transition"
    assert result.status == "max_steps" and set(result.missed) == {"accuracy", "average_bits"}


def test_bops_move_weights_and_inputs() -> None:
    most = searched(Budget(bops=1e12)).costs["bops"]
    result = searched(Budget(bops=0.3 * most), steps=20)
    assert result.status == "ok" and result.costs["bops"] <= 0.3 * most
    items = result.log["items"]
    assert {item["kind"] for item in items} == {"weight", "input"} and len(items) == 18
    moved = [name for entry in result.log["steps"] for name, _, _ in entry["moved"]]
    assert any(name.endswith(".input") for name in moved)
    inputs = {layer.input.bits for _, layer in result.plan if layer is not None and layer.input is not None}
    assert inputs != {8} and inputs <= set(MENU)
    kept = searched(Budget(bops=0.3 * most), activations=False)
    assert len(kept.log["items"]) == 9


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_fewer_layers_than_clusters(layers: int) -> None:
    result = searched(Budget(average_bits=4.0), layers=layers)
    assert result.status == "ok" and result.costs["average_bits"] <= 4


def test_a_drop_that_any_accuracy_meets_is_warned_of() -> None:
    class Share(Accuracy):
        def __call__(self, model: nn.Module) -> float:
            return super().__call__(model) / 100

    with pytest.warns(UserWarning, match=r"accuracy_drop=1\.0 is met by any model: the reference has 0\.8.* percent"):
        searched(Budget(average_bits=4, accuracy_drop=1.0), Share())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        searched(Budget(average_bits=4, accuracy_drop=1.0))


def test_no_steps_are_done_where_none_are_asked_for() -> None:
    result = searched(Budget(average_bits=4.0), layers=1, steps=0)
    assert [entry["phase"] for entry in result.log["steps"]] == ["reference"] and result.status == "max_steps"
    assert set(result.missed) == {"average_bits"}


def test_layers_without_variance() -> None:
    model = deep()
    with torch.no_grad():
        model[0].weight.zero_()
        model[3].weight.fill_(0.5)
    result = searched(Budget(average_bits=4.0), model=model)
    assert result.status == "ok"
    for entry in result.log["steps"]:
        assert all(math.isfinite(x) for mode in entry["scores"].values() for x in mode)


def test_bad_input_is_told_before_any_work() -> None:
    accuracy = Accuracy()
    with pytest.raises(BudgetError, match=r"average_bits=1\.5 cannot be met: the least possible is 2 with the menu"):
        searched(Budget(average_bits=1.5), accuracy)
    with pytest.raises(BudgetError, match=r"size_bytes=10 cannot.*; a budget of average_bits=1 cannot"):
        searched(Budget(size_bytes=10, average_bits=1), accuracy)
    with pytest.raises(BudgetError, match=r"accuracy_drop=1 counts from .*menu \(2, 4\) does not allow: add 8"):
        searched(Budget(average_bits=3, accuracy_drop=1), accuracy, menu=(2, 4))
    with pytest.raises(QuantizationError, match="no quantizable layer"):
        searched(Budget(average_bits=4), accuracy, model=nn.Sequential(nn.ReLU()))
    with pytest.raises(PlanError, match="nothing to choose"):
        searched(Budget(average_bits=8), accuracy, menu=(8,))
    with pytest.raises(PlanError, match="kl must be one of .*did you mean 'spread'"):
        searched(Budget(average_bits=4), accuracy, kl="spred")
    with pytest.raises(PlanError, match=r"patience must be a whole number from 1, got 0"):
        searched(Budget(average_bits=4), accuracy, patience=0)
    with pytest.raises(PlanError, match="penalty_step must be a number from 0, got inf"):
        searched(Budget(average_bits=4), accuracy, penalty_step=math.inf)
    with pytest.raises(PlanError, match="a search has no setting 'patiense'; did you mean 'patience'"):
        searched(Budget(average_bits=4), accuracy, patiense=2)
    with pytest.raises(PlanError, match="act_bits"):
        searched(Budget(bops=1e3), accuracy, style=FREE.__class__(), activations=True)
    model = deep()
    with torch.no_grad():
        model[3].weight[0, 0] = math.nan
    with pytest.raises(QuantizationError, match="weight of layer '3'"):
        searched(Budget(average_bits=4), accuracy, model=model)
    assert accuracy.calls == 0


def test_the_window_slides_and_what_does_not_fit_is_left_out() -> None:
    items = [Item(str(i), "weight", MENU) for i in range(4)]
    bits, order = [4, 4, 4, 8], [2, 0, 1]
    assert next_move(items, bits, order, 2, [], up=True) == [6, 4, 6, 8]
    assert next_move(items, bits, order, 2, [[6, 4, 6, 8]], up=True) == [6, 6, 4, 8]
    tried = [[6, 4, 6, 8], [6, 6, 4, 8], [4, 6, 4, 8]]
    assert next_move(items, bits, order, 2, tried, up=True) is None
    assert next_move(items, bits, order, 2, [], up=True, fits=lambda b: b[2] == 4) == [6, 6, 4, 8]
    assert next_move(items, bits, order, 1, [], up=False) == [4, 4, 2, 8]


@pytest.mark.parametrize(
    ("accuracy", "cost", "region"),
    [(90, 4, "target"), (90, 5, "bit-decrease"), (89, 4, "bit-increase"), (89, 6, "transition"),
     (80, 4.2, "transition"), (80, 6, "iteration")],
)  # fmt: skip
def test_regions(accuracy: float, cost: float, region: str) -> None:
    goal = Goal(90.0, 2.0, {"average_bits": 4.0}, {"average_bits": 0.4})
    assert goal.region(accuracy, {"average_bits": cost}, rounds_left=True) == region
    assert goal.distance(88, {"average_bits": 4.8}) == pytest.approx(3)
    assert goal.near(accuracy, {"average_bits": cost}) == (region != "iteration")


def test_the_best_epoch_is_kept_and_training_stops_early() -> None:
    answers = iter([80.0, 70.0, 85.0, 60.0, 50.0, 40.0, 30.0])
    accuracy = Accuracy(fails=None)

    def measure(model: nn.Module) -> float:
        accuracy(model)
        return next(answers)

    model = deep()
    layout = Layout(Problem(model, model_shape(model), Budget(average_bits=4), MENU, FREE))
    subject = Subject(model, layout, disturb, measure, BATCHES)
    subject.apply(layout.at(4))
    subject.refresh()
    assert subject.cycle(10, 1, patience=3) == (85.0, 6)
    assert equal_states(subject.model.state_dict(), accuracy.states[2])


def test_moving_one_layer_leaves_the_others_alone_and_norms_follow_the_batches() -> None:
    model = quantize(deep(), searched(Budget(average_bits=8)).plan, verbose=False)
    calibrate(model, BATCHES)
    seen = []
    handle = model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    refresh_norms(model, BATCHES)
    handle.remove()
    mean = torch.stack([x.mean(0) for x in seen]).mean(0)
    assert torch.allclose(model[1].running_mean, mean, atol=1e-6) and model[1].momentum == 0.1
    assert model.training
