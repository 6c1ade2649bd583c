from __future__ import annotations

import torch
from torch import nn

from fewbits.train import Ema


def test_the_average_follows_its_definition_and_can_be_swapped_in() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema, expected = Ema(model, 0.75), 0.0
    for k, value in enumerate([4.0, 8.0, -2.0]):
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update()
        expected = value if k == 0 else 0.75 * expected + 0.25 * value
    with ema.applied():
        assert model.weight.item() == expected
    assert model.weight.item() == -2.0
    saved = {name: value.clone() for name, value in ema.state_dict().items()}
    restored = Ema(model, 0.75)
    restored.load_state_dict(saved)
    for average in (ema, restored):
        average.update()
    assert torch.equal(ema.state_dict()["weight"], restored.state_dict()["weight"])
    ema.copy_to_model()
    assert model.weight.item() == 0.75 * expected - 0.5


def test_before_the_first_step_there_is_no_average() -> None:
    model = nn.Linear(2, 2)
    weight = model.weight.detach().clone()
    ema = Ema(model, 0.9)
    with ema.applied():
        assert torch.equal(model.weight, weight)
    ema.copy_to_model()
    assert torch.equal(model.weight, weight) and ema.state_dict() == {}
