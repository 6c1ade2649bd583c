from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fewbits.deploy import pack
from fewbits.deploy.onnx_export import export_onnx
from fewbits.deploy.verify import verify
from fewbits.errors import DataError, RecipeError
from fewbits.layers import calibrate, quantize
from fewbits.plan import LayerPlan, Plan, TensorPlan
from fewbits.tasks.gpt import CONFIGS, GPT, gpt, rotate, rotations
from fewbits.tasks.language import block_rules


def same_token(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    return (got.argmax(-1) == want.argmax(-1)).flatten()


KINDS: list[dict[str, Any]] = [{}, {"positions": "rotary", "norm": "rms", "tied": False, "bias": True}]


def small(**changes: Any) -> GPT:
    return gpt("gpt_nano", **{"vocabulary": 31, "context": 24, "layers": 2, "heads": 2, "width": 16, **changes}).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_changes_no_answer_before_it(kind: dict[str, Any]) -> None:
    model, tokens = small(**kind), torch.randint(31, (2, 20))
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 31
    first, second = model(tokens), model(changed)
    assert first.shape == (2, 20, 31)
    assert torch.equal(first[:, :12], second[:, :12])
    assert not torch.allclose(first[:, 12:], second[:, 12:])


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_earlier_tokens_matters(kind: dict[str, Any]) -> None:
    model = small(**kind)
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert not torch.allclose(model(tokens)[:, -1], model(tokens[:, [1, 0, 2, 3]])[:, -1])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_in_pieces_through_a_cache_are_the_whole(kind: dict[str, Any]) -> None:
    model, tokens = small(**kind), torch.randint(31, (2, 20))
    cache = model.new_cache()
    pieces = torch.cat([model(part, cache) for part in tokens.split([7, 1, 5, 7], dim=1)], dim=1)
    torch.testing.assert_close(pieces, model(tokens), rtol=1e-4, atol=1e-5)
    assert cache.length == 20
    with pytest.raises(DataError, match="25 tokens are more than the model's context of 24"):
        model(tokens[:, :5], cache)


def test_rotation_depends_on_the_distance_only() -> None:
    cosines, sines = rotations(50, 8)
    query, key = torch.randn(2, 8)
    turned = [rotate(v.expand(50, 8), cosines, sines) for v in (query, key)]
    assert torch.allclose(turned[0][7] @ turned[1][3], turned[0][40] @ turned[1][36], atol=1e-4)
    assert not torch.allclose(turned[0][7] @ turned[1][3], turned[0][7] @ turned[1][5], atol=1e-2)
    assert torch.allclose(turned[0].norm(dim=1), query.norm().expand(50), atol=1e-4)


def test_the_sizes_are_those_of_nanogpt() -> None:
    character, medium = (sum(p.numel() for p in gpt(n).parameters()) for n in ("gpt_char", "gpt_micro"))
    # 12 layers x width^2 x depth, norms, embeddings of 256 bytes and of the positions
    assert character == 12 * 6 * 384**2 + (2 * 6 + 1) * 384 + 256 * 384 + 256 * 384 == 10_818_432
    assert medium < character
    with torch.device("meta"):
        assert sum(p.numel() for p in gpt("gpt2", vocabulary=50257).parameters()) == 124_439_808, "that of GPT-2"


def test_an_untrained_model_knows_nothing() -> None:
    model, tokens = small(), torch.randint(31, (4, 24))
    entropy = torch.distributions.Categorical(logits=model(tokens)).entropy().mean()
    assert float(entropy.detach()) == pytest.approx(math.log(31), abs=0.05)
    assert model.head.weight is model.embedding.weight and small(tied=False).head.weight is not model.head.weight


def test_dropout_is_for_training_only() -> None:
    model, tokens = small(dropout=0.5), torch.randint(31, (1, 9))
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_without_graph_breaks(kind: dict[str, Any]) -> None:
    assert torch._dynamo.explain(small(**kind))(torch.zeros(2, 8, dtype=torch.int64)).graph_break_count == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_one_runs_in_onnx_runtime(kind: dict[str, Any], tmp_path: Any) -> None:
    model, tokens = small(**kind), torch.randint(31, (8, 24))
    layer = LayerPlan(weight=TensorPlan(4), input=TensorPlan(8, symmetric=False))
    calibrate(quantize(model, Plan(tuple(block_rules(model, layer))), verbose=False), [tokens])
    packed = pack(model)
    export_onnx(packed, tmp_path / "m.onnx", tokens[:2], mode="smallest")
    report = verify(tmp_path / "m.onnx", packed, [tokens[:4], tokens[4:]], min_agreement=90, agreement=same_token)
    assert report.samples == 8 * 24, "each token is an answer"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt_nan", {}, "unknown GPT configuration 'gpt_nan'; did you mean 'gpt_nano'"),
        ("gpt_nano", {"layer": 2}, "no option 'layer'; did you mean 'layers'"),
        ("gpt_nano", {"heads": 5}, "width 48 is no multiple of 5 heads"),
        ("gpt_nano", {"heads": 16, "positions": "rotary"}, "even head size, got 48 / 16"),
        ("gpt_nano", {"positions": "sine"}, "positions rotary or learned"),
        ("gpt_nano", {"context": 0}, "context of a GPT must be a whole number from 1, got 0"),
        ("gpt_nano", {"dropout": 1.0}, "dropout must be from 0 to below 1"),
    ],
)
def test_what_cannot_be_built_is_told(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        gpt(name, **changes)


def test_every_configuration_is_sound() -> None:
    assert all(config.width % config.heads == 0 for config in CONFIGS.values())
