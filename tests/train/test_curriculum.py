from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fewbits.errors import TrainingError
from fewbits.train import Curriculum, Stage
from fewbits.train.curriculum import NEVER

from .staged import TWO, float_net, quantized


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stages": [Stage(["a"], 0.5), Stage(["b"], 0.4)]}, r"add up to 1, got \[0.5, 0.4\]: 0.9"),
        ({"stages": []}, "add up to 1"),
        ({"stages": [Stage(["a"], 0.5), Stage(["b", "a"], 0.5)]}, r"\['a'\] is named more than once"),
        ({"stages": [Stage(["a"], 1.0)], "frozen": ["a"]}, r"\['a'\] is named more than once"),
        ({"stages": [Stage(["a"], 1.0)], "norms": "fold"}, "norms must be 'train' or 'frozen', got 'fold'"),
    ],
)
def test_a_curriculum_that_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Curriculum(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quantize": "backbone", "share": 1.0}, "sequence of names, got 'backbone'"),
        ({"quantize": ["a"], "share": 1.0, "distill": "feat"}, "distill of a stage is a sequence"),
        ({"quantize": [], "share": 1.0}, "quantizes no module"),
        ({"quantize": ["a"], "share": 0.0}, "share is the part of the steps"),
        ({"quantize": ["a"], "share": 1.5}, "share is the part of the steps"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Stage(**given)


@pytest.mark.parametrize(
    ("shares", "total", "ends"),
    [
        ((1 / 3, 2 / 3), 300, [100, 300]),
        ((0.333, 0.667), 300, [100, 300]),
        ((1 / 3, 2 / 3), 10, [4, 10]),  # the step 3 begins at 3/10 of the samples, before 1/3
        ((0.333, 0.333, 0.333), 9, [3, 6, 9]),
        ((0.1, 0.2, 0.7), 10, [1, 3, 10]),
        ((1.0,), 7, [7]),
    ],
)
def test_a_stage_ends_at_its_share_of_the_samples(shares: tuple[float, ...], total: int, ends: list[int]) -> None:
    stages = [Stage([f"m{i}"], share) for i, share in enumerate(shares)]
    assert Curriculum(stages).ends(total) == ends


def test_a_stage_without_a_step_is_refused() -> None:
    with pytest.raises(TrainingError, match="stage 2 of 2 has none of the 1 steps"):
        TWO.ends(1)


def test_a_module_belongs_to_the_nearest_name_above_it() -> None:
    curriculum = Curriculum([Stage(["model.backbone"], 0.5), Stage(["model"], 0.5)], frozen=["model.text"])
    places = {name: curriculum.place(name) for name in ("model.backbone.a", "model.backboned", "model.text.b", "other")}
    assert places == {"model.backbone.a": 0, "model.backboned": 1, "model.text.b": NEVER, "other": None}
    assert Curriculum([Stage(["a"], 0.5), Stage([""], 0.5)]).place("other.b") == 1


def test_names_and_model_are_held_together() -> None:
    TWO.check(quantized())
    TWO.check(float_net())
    with pytest.raises(TrainingError, match=r"names 'backbones', which this model has not; did you mean 'backbone'"):
        Curriculum([Stage(["backbones"], 0.5), Stage(["head"], 0.5)]).check(float_net())
    with pytest.raises(TrainingError, match=r"2 layers are in no stage, the first is 'backbone.first.0'"):
        Curriculum([Stage(["backbone.second"], 0.5), Stage(["head"], 0.5)]).check(quantized())
    frozen = Curriculum([Stage(["backbone.second", "head"], 1.0)], frozen=["backbone.first"])
    frozen.check(float_net())
    untrained = float_net()
    untrained.backbone.first.requires_grad_(False)
    Curriculum([Stage(["backbone.second", "head"], 1.0)]).check(untrained)
    with pytest.raises(TrainingError, match=r"'backbone.first.0' is frozen in float, but quantized by the plan"):
        frozen.check(quantized())


def test_a_parameter_of_no_submodule_is_named_itself() -> None:
    net = float_net()
    net.level = nn.Parameter(torch.zeros(2))
    with pytest.raises(TrainingError, match=r"1 layers are in no stage, the first is '\(model\)'"):
        TWO.check(net)
    stages = [Stage(["backbone"], 1 / 3), Stage(["head", "level"], 2 / 3)]
    curriculum = Curriculum(stages)
    curriculum.check(net)
    assert curriculum.place("level") == 1


def test_a_layer_under_two_names_must_have_both_in_stages() -> None:
    tied = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    tied.append(tied[0])
    with pytest.raises(TrainingError, match=r"1 layers are in no stage, the first is '2'"):
        Curriculum([Stage(["0"], 1.0)]).check(tied)
