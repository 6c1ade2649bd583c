"""What a bit width does to a layer: the distortion that the solver sums up.

Every measure returns {layer: [distortion of each choice]}, for layers that own their weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.allocate.style import Style
from fewbits.cost import require_layers
from fewbits.errors import DataError, QuantizationError
from fewbits.layers import float_class, set_mode, twin_class
from fewbits.layers.swap import layer_weight

Menu = Sequence[int] | Mapping[str, Sequence[int]]
QuantizeError = Callable[[nn.Module, Tensor, int], Tensor]
SAMPLE = 1 << 16  # weights of a layer that are looked at


def style_error(style: Style) -> QuantizeError:
    """Return the function (layer, weight, bits) -> quantized minus float weight, by the weight plan of a style."""

    def error(layer: nn.Module, weight: Tensor, bits: int) -> Tensor:
        twin = twin_class(float_class(layer))
        assert twin is not None
        quantized: Tensor = twin.make_weight_quantizer(weight, style.weight(bits))(weight)
        return quantized - weight

    return error


def weight_mse(
    model: nn.Module,
    menu: Menu,
    *,
    relative: bool = True,
    quantize_error: QuantizeError | None = None,
    sample: int = SAMPLE,
) -> dict[str, list[float]]:
    """Return the squared quantization error of each layer's weight at each width.

    menu: widths for all layers, or by layer. relative: as a fraction of the weight's squared norm, so that a layer's
    noise counts against its signal; otherwise the plain sum. quantize_error: as of ``style_error``; by default
    symmetric, per channel, with the range of least squared error. sample: a larger weight is judged by evenly spaced
    channels with about so many elements. Raises QuantizationError, naming the layer, for weights that are not finite.
    """
    error = quantize_error or style_error(Style())
    found = {}
    for name, layer in own_layers(model).items():
        weight, _, share = _sampled(layer, sample)
        power = float(weight.double().square().sum())
        unit = max(power, torch.finfo(torch.float32).tiny) if relative else share
        squares = (layer_error(error, name, layer, weight, bits).double().square() for bits in widths_of(menu, name))
        found[name] = [float(square.sum()) / unit for square in squares]
    return found


def fisher(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    menu: Menu,
    *,
    quantize_error: QuantizeError | None = None,
    sample: int = SAMPLE,
) -> dict[str, list[float]]:
    """Return the expected rise of the loss for each layer at each width, to second order, from one pass.

    Sum over weights of mean squared gradient * squared quantization error / 2: the Taylor expansion with the
    empirical Fisher information for the Hessian (LeCun et al. 1990, "Optimal brain damage", eq. 5; Theis et al. 2018,
    "Faster gaze prediction with dense networks and Fisher pruning", eq. 9). Gradients are those of a batch: smaller
    batches come nearer to the Fisher information. loss: (model, batch) -> scalar. The model runs in float and in
    eval mode; its mode, its gradients and ``requires_grad`` are as before afterwards. Raises DataError if there are
    no batches or a loss is not finite. Other arguments: as of ``weight_mse``.
    """
    error, layers = quantize_error or style_error(Style()), own_layers(model)
    squared = _mean_squared_gradients(model, layers, batches, loss)
    found = {}
    for name, layer in layers.items():
        weight, channels, share = _sampled(layer, sample)
        importance = squared[name].index_select(_axis(layer), channels).double()
        errors = (layer_error(error, name, layer, weight, bits) for bits in widths_of(menu, name))
        found[name] = [float((importance * e.double().square()).sum()) / 2 / share for e in errors]
    return found


def own_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of ``own_layers`` by the layer's name."""
    return {name: _weight(layer) for name, layer in own_layers(model).items()}


def own_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers with a weight; of those that share one, the first."""
    own: dict[int, str] = {}
    layers = {n: m for n, m in require_layers(model).items() if layer_weight(m) is not None}
    return {n: m for n, m in layers.items() if own.setdefault(id(layer_weight(m)), n) == n}


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer_weight(layer)
    assert weight is not None
    return weight


def _axis(layer: nn.Module) -> int:
    twin = twin_class(float_class(layer))
    assert twin is not None
    return twin.channel_axis


def _sampled(layer: nn.Module, sample: int) -> tuple[Tensor, Tensor, float]:
    """Return (weight of evenly spaced channels, their index, their share of all channels)."""
    weight, axis = _weight(layer).detach(), _axis(layer)
    count = weight.shape[axis]
    kept = max(1, min(count, sample * count // max(weight.numel(), 1)))
    index = torch.arange(kept, device=weight.device) * count // kept
    return weight.index_select(axis, index), index, kept / count


def widths_of(menu: Menu, name: str) -> Sequence[int]:
    """Return the widths that a menu has for a layer."""
    return menu[name] if isinstance(menu, Mapping) else menu


def layer_error(error: QuantizeError, name: str, layer: nn.Module, weight: Tensor, bits: int) -> Tensor:
    """Return the error of a layer's weight at a width. Raises QuantizationError, naming the layer."""
    try:
        with torch.no_grad():
            return error(layer, weight, bits)
    except QuantizationError as problem:
        raise QuantizationError(f"weight of layer {name!r}: {problem}") from problem


def _mean_squared_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> dict[str, Tensor]:
    weights = own_weights(model)
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    count = 0
    with probing(model, weights.values()):
        for count, batch in enumerate(batches, start=1):
            value = checked_loss(loss, model, batch, count)
            gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            for name, gradient in zip(sums, gradients):
                if gradient is not None:
                    sums[name] += gradient.square()
    if not count:
        raise DataError("Fisher sensitivity needs at least one batch, got none")
    return {name: total / count for name, total in sums.items()}


def checked_loss(
    loss: Callable[[nn.Module, Any], Tensor], model: nn.Module, batch: Any, count: int, when: str = ""
) -> Tensor:
    """Return the loss of batch number ``count``. Raises DataError, with ``when`` in its words, unless it is finite."""
    value = loss(model, batch)
    if not bool(torch.isfinite(value)):
        raise DataError(
            f"the loss of batch {count} is {float(value.detach())}{when and ' ' + when}: look for NaN or Inf in it, or "
            "in the model"
        )
    return value


@contextmanager
def probing(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, the model runs in float and eval mode, and its weights require gradients."""
    training = {module: module.training for module in model.modules()}
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        model.eval()
        for weight in frozen:
            weight.requires_grad_(True)
        with set_mode(model, "float"), torch.enable_grad():
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        for module, mode in training.items():
            module.training = mode
