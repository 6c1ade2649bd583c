"""Language modelling: loss, metrics, models by name, and which of their layers are quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import DataError, PlanError, RecipeError, nearest
from fewbits.layers import float_class, in_eval, quantizable, twin_class
from fewbits.layers.swap import layer_weight
from fewbits.plan import LayerPlan, Rule
from fewbits.tasks.data import Batch
from fewbits.tasks.gpt import gpt
from fewbits.tasks.text import TextExamples

LIBRARY = "transformers:"
LanguageModel = Callable[[Tensor], Tensor]


def next_token_loss(model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy in nats of (tokens [B, T], the tokens that follow them [B, T]), a scalar."""
    tokens, following = batch
    logits = model(tokens)
    return F.cross_entropy(logits.flatten(0, -2).float(), following.flatten(), label_smoothing=label_smoothing)


def answers(
    model: LanguageModel, examples: TextExamples, batch_size: int, device: torch.device | str | None = None
) -> Iterator[Batch]:
    """Yield (logits float32 [B, T, V], the tokens that follow [B, T]) of all windows in order, on the CPU.

    model: a module, which runs in eval mode meanwhile, or any callable. device: where batches go; None: where the
    module's parameters are, else the CPU. Raises DataError where the outputs are not logits of every token.
    """
    module = model if isinstance(model, nn.Module) else nn.Module()
    found = next((p.device for p in module.parameters()), torch.device("cpu"))
    for tokens, following in examples.batches(batch_size):
        with in_eval(module), torch.no_grad():  # not around the yield: the caller may train meanwhile
            logits = model(tokens.to(device or found))
        if not isinstance(logits, Tensor) or logits.shape[:-1] != following.shape:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise DataError(f"expected logits [batch, tokens, vocabulary] of tokens {list(tokens.shape)}, got {got}")
        yield logits.to("cpu", torch.float32), following


def score(pairs: Iterable[Batch], bytes_per_token: float) -> dict[str, float]:
    """Score pairs of logits [B, T, V] and the tokens that follow [B, T].

    perplexity: exp(loss). bits_per_byte: loss / ln 2 / bytes_per_token, which compares tokenizers. token_accuracy:
    percent of tokens whose likeliest successor is the right one. loss: mean nats of a token. Raises DataError for NaN
    among the logits, and where there is no pair.
    """
    nats, right, count = 0.0, 0, 0
    for logits, following in pairs:
        if logits.isnan().any():
            raise DataError(f"the model returned NaN among the logits of tokens {count}..{count + following.numel()}")
        losses = F.cross_entropy(logits.flatten(0, -2), following.flatten(), reduction="none")
        nats, count = nats + float(losses.double().sum()), count + following.numel()
        right += int((logits.argmax(-1) == following).sum())
    if count == 0:
        raise DataError("there are no windows to score; give a longer text")
    loss = nats / count
    return {
        "perplexity": math.exp(min(loss, 700.0)),  # beyond it a float64 overflows
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "token_accuracy": 100 * right / count,
        "loss": loss,
    }


def evaluate(model: LanguageModel, examples: TextExamples, batch_size: int = 16) -> dict[str, float]:
    """Return the metrics of ``score`` over all windows; errors as for ``answers`` and ``score``."""
    return score(answers(model, examples, batch_size), examples.bytes_per_token)


class CausalLM(nn.Module):
    """A causal language model of the transformers library as [B, T] tokens -> [B, T, vocabulary] logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def context(self) -> int | None:
        """The most positions, where the configuration tells."""
        found: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return found

    @property
    def vocabulary(self) -> int:
        """The number of tokens."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def new_cache(self) -> Any:
        """Return an empty cache for ``forward``."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def forward(self, tokens: Tensor, cache: Any = None) -> Tensor:
        """Return logits [B, T, vocabulary] of int64 tokens [B, T]; with a cache these follow the tokens in it."""
        logits: Tensor = self.model(input_ids=tokens, past_key_values=cache, use_cache=cache is not None).logits
        return logits


def build_language_model(name: str, **options: Any) -> nn.Module:
    """Build a language model by name.

    name: a key of ``fewbits.tasks.gpt.CONFIGS`` (options: fields of ``GPTConfig``); or ``transformers:X``, where X is
    a folder that ``save_pretrained`` wrote, a model type such as ``llama`` (random weights; options: fields of its
    configuration), or a name in the local cache of the hub. Raises RecipeError for an unknown name or option.
    """
    if not name.startswith(LIBRARY):
        return gpt(name, **options)
    try:
        import transformers
    except ImportError as error:
        raise RecipeError(f"{name} needs transformers: pip install 'fewbits[models]'") from error
    return CausalLM(_library_model(transformers, name.removeprefix(LIBRARY), options))


def _library_model(transformers: Any, name: str, options: dict[str, Any]) -> Any:
    try:
        if name in transformers.CONFIG_MAPPING:
            _check_fields(name, transformers.AutoConfig.for_model(name), options)
            config = transformers.AutoConfig.for_model(name, **options)
            return transformers.AutoModelForCausalLM.from_config(config)
        return transformers.AutoModelForCausalLM.from_pretrained(
            str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name,
            local_files_only=True,
            dtype=torch.float32,
            **options,
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        hint = nearest(name, [*transformers.CONFIG_MAPPING])
        raise RecipeError(
            f"transformers has no causal language model {name!r}{hint}: expected a folder with config.json and "
            f"weights, a model type, or a name that 'hf download' has fetched ({' '.join(str(error).split())[:200]})"
        ) from error


def _check_fields(name: str, config: Any, options: dict[str, Any]) -> None:
    """Raise RecipeError for an option that the configuration would keep, and the model ignore."""
    for option in options:
        if not (hasattr(config, option) or hasattr(config, f"_{option}")):
            raise RecipeError(
                f"{name} has no option {option!r}{nearest(option, config.to_dict())}; see its configuration"
            )


def is_language_model(name: str) -> bool:
    """Tell whether a model name is meant for ``build_language_model``."""
    return name.startswith(("gpt", LIBRARY))


def block_linears(model: nn.Module) -> list[str]:
    """Return the linear layers (nn.Linear, GPT-2's Conv1D) of attention and MLP: those in the model's repeated blocks.

    These are the layers inside an ``nn.ModuleList``; the LM head, embeddings and layers that share their weight with an
    embedding are outside or left out. Raises PlanError where there are none.
    """
    repeated = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and hasattr(m, "weight")}
    found = [
        name
        for name, layer in quantizable(model).items()
        if getattr(twin_class(float_class(layer)), "is_linear", False)
        and any(name.startswith(f"{outer}.") for outer in repeated)
        and id(layer_weight(layer)) not in embedded
    ]
    if not found:
        raise PlanError(
            f"{type(model).__name__} has no linear layers inside an nn.ModuleList of blocks; name its layers with "
            "method: explicit and rules"
        )
    return found


def block_rules(model: nn.Module, layer: LayerPlan) -> list[Rule]:
    """Return rules that quantize attention and MLP linears alike; embeddings, LM head, norms and the products between
    activations stay in float."""
    return [(name, layer) for name in block_linears(model)]
