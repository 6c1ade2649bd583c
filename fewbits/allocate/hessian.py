"""Sensitivity from the trace of the Hessian, as HAWQ-V2 takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewbits.allocate.sensitivity import (
    Menu,
    QuantizeError,
    checked_loss,
    own_weights,
    probing,
    weight_mse,
)
from fewbits.errors import DataError

PROBES = 8


def hessian(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    menu: Menu,
    *,
    probes: int = PROBES,
    seed: int = 0,
    quantize_error: QuantizeError | None = None,
) -> dict[str, list[float]]:
    """Return the expected rise of the loss for each layer at each width, from the layer's mean curvature.

    Half the average eigenvalue of the layer's Hessian times the squared quantization error: Dong et al. 2020,
    "HAWQ-V2: Hessian aware trace-weighted quantization of neural networks", their Omega; the half of the Taylor
    expansion makes it a loss. A negative average, as noise or a saddle gives it, counts as 0. probes, seed: as of
    ``hessian_traces``; other arguments: as of ``fisher``.
    """
    traces = hessian_traces(model, batches, loss, probes=probes, seed=seed)
    counts = {name: max(weight.numel(), 1) for name, weight in own_weights(model).items()}
    errors = weight_mse(model, menu, relative=False, quantize_error=quantize_error)
    return {name: [max(traces[name], 0.0) / counts[name] * e / 2 for e in errors[name]] for name in traces}


def hessian_traces(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    probes: int = PROBES,
    seed: int = 0,
) -> dict[str, float]:
    """Return the trace of the loss's Hessian by the weight of each layer, estimated by Hutchinson's method.

    Mean over ``batches`` and over ``probes`` random sign vectors v of v_i . (H v)_i, all layers in one product; exact
    in expectation (Hutchinson 1990). The model runs as for ``fisher``. Raises DataError if there are no batches or a
    loss is not finite, and where ``probes`` is below 1.
    """
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise DataError(f"probes must be a whole number from 1, got {probes!r}")
    weights = own_weights(model)
    sums, count = torch.zeros(len(weights), dtype=torch.float64), 0
    draw = torch.Generator().manual_seed(seed)
    # fused attention has no second derivative
    with probing(model, weights.values()), sdpa_kernel(SDPBackend.MATH):
        for count, batch in enumerate(batches, start=1):
            value = checked_loss(loss, model, batch, count)
            signs = (_signs(weights.values(), draw) for _ in range(probes))
            sums += _mean_products(value, list(weights.values()), signs)
    if not count:
        raise DataError("Hessian sensitivity needs at least one batch, got none")
    return dict(zip(weights, (sums / count).tolist()))


def _mean_products(value: Tensor, weights: Sequence[Tensor], signs: Iterable[Sequence[Tensor]]) -> Tensor:
    """Return [layers] the mean over ``signs`` v of v_i . (H v)_i, H of the scalar ``value`` by all weights."""
    gradients = torch.autograd.grad(value, weights, create_graph=True, materialize_grads=True)
    curved = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]
    if not curved:  # linear in all weights
        return torch.zeros(len(weights), dtype=torch.float64)
    found = []
    for vectors in signs:
        products = torch.autograd.grad(
            [gradients[i] for i in curved],
            weights,
            grad_outputs=[vectors[i] for i in curved],
            retain_graph=True,
            materialize_grads=True,
        )
        found.append(torch.stack([(v * p).double().sum().cpu() for v, p in zip(vectors, products)]))
    return torch.stack(found).mean(dim=0)


def _signs(weights: Iterable[Tensor], draw: torch.Generator) -> list[Tensor]:
    """Return a vector of +1 and -1 a weight; drawn on the CPU, so that every device sees the same."""
    return [
        (torch.randint(0, 2, w.shape, generator=draw).mul_(2).sub_(1)).to(dtype=w.dtype, device=w.device)
        for w in weights
    ]
