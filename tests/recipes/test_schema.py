from __future__ import annotations

from typing import Any

import pytest

from fewbits.errors import RecipeError
from fewbits.recipes.read import find, parse, read

MINIMAL: dict[str, Any] = {
    "data": {"source": "digits"},
    "model": {"name": "reference_cnn"},
    "plan": {"weight_bits": 2},
}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"plan": {}}, "either plan.weight_bits or a budget"),
        ({"budget": {"size_mb": 1}}, "either plan.weight_bits or a budget"),
        ({"plan": {"method": "solver"}}, "method solver needs a budget"),
        (
            {"plan": {"method": "solver", "weight_bits": 2}, "budget": {"size_mb": 1}},
            "weight_bits is for method uniform",
        ),
        ({"plan": {"method": "explicit"}}, "needs plan.rules"),
        ({"plan": {"method": "file"}}, "give both or neither"),
        ({"plan": {"weight_bits": 2, "file": "a.json"}}, "give both or neither"),
        ({"plan": {"method": "explicit", "rules": [["a", None]]}, "budget": {"size_mb": 1}}, "takes no budget"),
        ({"budget": {}}, "a budget needs one of"),
        ({"plan": {"weight_bits": 2, "rules": [["a", {"weight": {"bits": 99}}]]}}, "plan: bits must be one of"),
        ({"plan": {"weight_bits": 2, "rules": [["a", {"weigth": {"bits": 2}}]]}}, "did you mean 'weight'"),
        ({"qat": {}}, "qat: epochs=None and max_steps=None: give exactly one"),
        ({"qat": {"epochs": 1, "lr": -1}}, "qat: lr must be above 0"),
        ({"data": {"source": "digits", "validation": 1.0}}, "data.validation: .*less than 1"),
        ({"budget": {"size_mb": -1}, "plan": {}}, "budget.size_mb: .*greater than 0"),
    ],
)
def test_what_cannot_be_run_is_refused_with_its_place(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(MINIMAL | sections, "my.yaml")


def test_a_smoke_run_is_short_and_needs_no_data() -> None:
    recipe = read(find("cifar10_resnet20"))
    smoked = recipe.smoked()
    assert recipe.qat is not None and smoked.qat is not None
    assert (smoked.qat.epochs, smoked.qat.max_steps) == (None, recipe.smoke.steps)
    assert smoked.qat.lr == recipe.qat.lr
    assert smoked.data.stand_in and smoked.data.train_examples == recipe.smoke.train_examples
    assert smoked.plan == recipe.plan and smoked.budget == recipe.budget


def test_a_training_becomes_a_fit_config() -> None:
    recipe = parse({**MINIMAL, "qat": {"epochs": 2, "lr": 0.5, "optimizer": "adamw", "ema": 0.9}}, "my.yaml")
    assert recipe.qat is not None
    config = recipe.qat.fit_config(seed=7)
    assert (config.epochs, config.lr, config.optimizer, config.ema, config.seed) == (2, 0.5, "adamw", 0.9, 7)
