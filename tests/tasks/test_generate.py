from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.deploy import load, pack, save
from fewbits.errors import DataError
from fewbits.layers import calibrate, quantize
from fewbits.plan import LayerPlan, Plan, TensorPlan
from fewbits.tasks.generate import generate
from fewbits.tasks.gpt import GPT, gpt
from fewbits.tasks.language import block_rules

PROMPT = torch.tensor([[3, 1, 4], [1, 5, 9]])


def small(**changes: Any) -> GPT:
    return gpt("gpt_nano", **{"vocabulary": 31, "context": 300, "layers": 2, "heads": 2, "width": 32, **changes})


def quantized(**changes: Any) -> GPT:
    model = small(**changes)
    dynamic = TensorPlan(1, "denoise", symmetric=False, granularity="block", block=16)
    plan = Plan(tuple(block_rules(model, LayerPlan(weight=dynamic, input=dynamic))))
    calibrate(quantize(model, plan, verbose=False), [torch.randint(31, (4, 16))])
    return model


class Counter(nn.Module):
    """Says that the next token is one more, and that the one after it is the second likeliest."""

    def forward(self, tokens: Tensor) -> Tensor:
        following = nn.functional.one_hot((tokens + 1) % 10, 10).float()
        return 9 * following + 8 * following.roll(1, -1)


def test_greedy_takes_the_likeliest() -> None:
    assert generate(Counter(), torch.tensor([[3], [8]]), 4).tolist() == [[3, 4, 5, 6, 7], [8, 9, 0, 1, 2]]
    assert torch.equal(generate(Counter(), PROMPT, 0), PROMPT)


def test_sampling_follows_the_seed_the_temperature_and_top_k() -> None:
    prompt = torch.zeros(200, 1, dtype=torch.int64)
    first, again, other = (generate(Counter(), prompt, 1, temperature=1.0, seed=s)[:, 1] for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    ones, twos = (first == 1).float().mean(), (first == 2).float().mean()
    assert ones == pytest.approx(0.73, abs=0.1) and twos == pytest.approx(0.27, abs=0.1)
    assert set(generate(Counter(), prompt, 1, temperature=50.0)[:, 1].tolist()) == set(range(10))
    assert set(generate(Counter(), prompt, 1, temperature=50.0, top_k=2)[:, 1].tolist()) == {1, 2}


@pytest.mark.parametrize("build", [small, quantized])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_cache_changes_no_token(build: Any, positions: str) -> None:
    model = build(positions=positions).double()  # float32 rounds the same sums differently, which may flip a code
    with_cache = generate(model, PROMPT, 60)
    assert torch.equal(with_cache, generate(model, PROMPT, 60, cache=False))
    assert len(with_cache.unique()) > 2, "a model that repeats one token proves nothing"


def test_a_cache_gives_the_same_logits_at_one_bit() -> None:
    model, tokens = quantized().double().eval(), torch.randint(31, (2, 40))
    cache = model.new_cache()
    pieces = torch.cat([model(token, cache) for token in tokens.split(1, dim=1)], dim=1)
    torch.testing.assert_close(pieces, model(tokens), rtol=0, atol=1e-10)


def test_256_tokens_of_the_packed_model_are_those_of_the_trained_one(tmp_path: Any) -> None:
    model = quantized()
    save(pack(model), tmp_path / "m.safetensors")
    packed = load(tmp_path / "m.safetensors", small())
    trained = generate(model, PROMPT, 256)
    assert trained.shape == (2, 259) and len(trained.unique()) > 2
    assert torch.equal(trained, generate(packed, PROMPT, 256))


def test_the_mode_of_the_model_stays() -> None:
    model = small(dropout=0.9).train()
    model.blocks[0].eval()
    assert torch.equal(generate(model, PROMPT, 9), generate(model, PROMPT, 9))
    assert model.training and not model.blocks[0].training and model.blocks[1].training


def test_what_cannot_be_generated_is_told() -> None:
    model = small(context=10)
    assert generate(model, PROMPT, 8).shape == (2, 11)
    with pytest.raises(DataError, match="3 tokens and 9 more do not fit the model's context of 10; generate at most 8"):
        generate(model, PROMPT, 9)
    with pytest.raises(DataError, match=r"tokens 3\.\.31 are outside the model's vocabulary of 31"):
        generate(model, torch.tensor([[3, 31]]), 1)
    with pytest.raises(DataError, match="at least one token"):
        generate(model, torch.zeros(1, 0, dtype=torch.int64), 1)
    with pytest.raises(DataError, match="top_k=3 is for drawing"):
        generate(small(), PROMPT, 2, top_k=3)
    broken = small()
    torch.nn.init.constant_(broken.head.weight, torch.nan)
    with pytest.raises(DataError, match="after token 3 hold NaN"):
        generate(broken, PROMPT, 2)
    with pytest.raises(DataError, match="temperature >= 0"):
        generate(model, PROMPT, 1, temperature=-1)


def test_a_temperature_near_zero_takes_the_likeliest() -> None:
    model, prompt = gpt("gpt_nano", vocabulary=9, context=8), torch.tensor([[1, 2]])
    assert torch.equal(generate(model, prompt, 4, temperature=1e-40), generate(model, prompt, 4))
    with pytest.raises(DataError, match="temperature >= 0"):
        generate(model, prompt, 4, temperature=float("nan"))
