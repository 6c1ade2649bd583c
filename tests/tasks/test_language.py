from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.deploy import pack
from fewbits.errors import DataError, PlanError, RecipeError
from fewbits.layers import calibrate, quantize
from fewbits.plan import LayerPlan, Plan, TensorPlan
from fewbits.tasks.generate import generate
from fewbits.tasks.gpt import gpt
from fewbits.tasks.language import (
    CausalLM,
    answers,
    block_linears,
    block_rules,
    build_language_model,
    evaluate,
    next_token_loss,
    score,
)  # fmt: skip
from fewbits.tasks.text import TextExamples
from fewbits.train import Batches, FitConfig, fit

GPT2 = {
    "vocab_size": 40,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA = {
    "vocab_size": 40, "max_position_embeddings": 32, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
TINY = [("transformers:gpt2", GPT2), ("transformers:llama", LLAMA)]
FOUR_BITS = LayerPlan(weight=TensorPlan(4))


def examples(period: int = 5, length: int = 401, context: int = 8) -> TextExamples:
    """A text that repeats itself."""
    return TextExamples(tokens=(torch.arange(length) % period).int(), context=context, size=2 * length)


class Fixed(nn.Module):
    """The same logits for every token."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits.expand(*tokens.shape, -1)


def test_the_metrics_by_hand() -> None:
    model = Fixed([math.log(p) for p in (0.5, 0.25, 0.25)])
    found = evaluate(model, examples(period=3, length=97), batch_size=5)
    loss = (math.log(2) + 2 * math.log(4)) / 3
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx((1 + 2 + 2) / 3 / 2, rel=1e-5), "two bytes a token"
    assert found["token_accuracy"] == pytest.approx(100 / 3)
    assert next(iter(found)) == "perplexity", "the report speaks of the first metric"


def test_the_metrics_do_not_depend_on_the_batches_and_not_on_training_mode() -> None:
    model = gpt("gpt_nano", vocabulary=5, context=8, layers=1, dropout=0.5).train()
    first, again = (evaluate(model, examples(), batch_size) for batch_size in (7, 50))
    assert first == pytest.approx(again, rel=1e-5)
    assert model.training


def test_answers_may_be_taken_in_turn_and_leave_gradients_on() -> None:
    models = [gpt("gpt_nano", vocabulary=5, context=8, layers=1).train() for _ in range(2)]
    for (first, _), (second, _) in zip(*(answers(model, examples(), 20) for model in models), strict=True):
        assert torch.is_grad_enabled() and models[0].training
        assert not first.requires_grad and first.shape == second.shape
    assert torch.is_grad_enabled()


def test_the_loss_is_that_of_the_metrics() -> None:
    model, data = gpt("gpt_nano", vocabulary=5, context=8, layers=1).eval(), examples()
    loss = next_token_loss(model, data.gather(range(len(data))))
    assert float(loss.detach()) == pytest.approx(evaluate(model, data)["loss"], rel=1e-5)


def test_what_cannot_be_scored_is_told() -> None:
    with pytest.raises(DataError, match="NaN among the logits"):
        evaluate(Fixed([0.0, math.nan]), examples(period=2))
    with pytest.raises(DataError, match=r"expected logits \[batch, tokens, vocabulary\]"):
        list(answers(lambda tokens: tokens.float().mean(1), examples(), 4))
    with pytest.raises(DataError, match="no windows"):
        score([], 1.0)


def test_a_repeating_text_is_learned_in_one_bit() -> None:
    torch.manual_seed(0)
    model = gpt("gpt_nano", vocabulary=5, context=8, layers=1, heads=2, width=32)
    dynamic = TensorPlan(1, "denoise", symmetric=False, granularity="block", block=32)
    quantize(model, Plan(tuple(block_rules(model, LayerPlan(weight=dynamic, input=dynamic)))), verbose=False)
    config = FitConfig(max_steps=40, lr=0.01, optimizer="adamw", accelerator="cpu", progress=False)
    before = evaluate(model, examples())["perplexity"]
    fit(model, Batches(examples(), 16), next_token_loss, config)
    after = evaluate(pack(model), examples())
    assert before > 4 and after["perplexity"] < 1.2 and after["token_accuracy"] == 100


def test_attention_and_mlp_linears_of_a_gpt_are_quantized_and_nothing_else() -> None:
    names = block_linears(gpt("gpt_nano", layers=2))
    parts = ("attention.qkv", "attention.project", "up", "down")
    assert names == [f"blocks.{i}.{part}" for i in range(2) for part in parts]
    assert [rule for rule, _ in block_rules(gpt("gpt_nano", layers=1, tied=False), FOUR_BITS)] == names[:4]


def test_a_model_without_blocks_is_told() -> None:
    with pytest.raises(PlanError, match="no linear layers inside an nn.ModuleList"):
        block_linears(nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 3)))


@pytest.mark.parametrize(("name", "options"), TINY)
def test_a_model_of_transformers_is_quantized_packed_and_writes(name: str, options: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    model = build_language_model(name, **options).eval()
    linears = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and "lm_head" not in n]
    assert block_linears(model) == linears and len(linears) in (8, 14)
    prompt = torch.tensor([[1, 2, 3]])
    assert torch.equal(generate(model, prompt, 20), generate(model, prompt, 20, cache=False))
    plan = LayerPlan(weight=TensorPlan(2), input=TensorPlan(8, symmetric=False))
    calibrate(quantize(model, Plan(tuple(block_rules(model, plan))), verbose=False), [torch.randint(40, (4, 16))])
    packed = pack(model)
    tokens = torch.randint(40, (2, 16))
    assert torch.equal(packed(tokens), model(tokens))
    assert torch.equal(generate(packed, prompt, 20), generate(model, prompt, 20))
    with pytest.raises(DataError, match="context of 32"):
        generate(model, prompt, 31)


def test_a_model_of_transformers_is_read_from_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = build_language_model("transformers:gpt2", **GPT2).eval()
    assert isinstance(model, CausalLM)
    model.model.save_pretrained(tmp_path)
    again = build_language_model(f"transformers:{tmp_path}").eval()
    tokens = torch.randint(40, (1, 8))
    assert torch.equal(again(tokens), model(tokens)) and again.vocabulary == 40 and again.context == 32


def test_what_transformers_does_not_know_is_told(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(RecipeError, match=r"no causal language model 'llamma'; did you mean 'llama'"):
        build_language_model("transformers:llamma")
    with pytest.raises(RecipeError, match="expected a folder with config.json"):
        build_language_model(f"transformers:{tmp_path}")
    with pytest.raises(RecipeError, match="unknown GPT configuration 'gpt3'"):
        build_language_model("gpt3")


def test_an_option_that_a_configuration_does_not_know_is_told() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(RecipeError, match="llama has no option 'hiden_size'.*hidden_size"):
        build_language_model("transformers:llama", **LLAMA, hiden_size=8)
