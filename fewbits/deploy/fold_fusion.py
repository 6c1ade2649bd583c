"""Balanced fusion nodes disappear before pack: the norm becomes constant, and goes into what takes the result in.

LN(h) is taken as (h - mu) / sigma with constants from data (arXiv 2511.05898, eq. 11). "weight" multiplies them and the
gains into the next weight and bias (eq. 12, 18-22). "requant" leaves the weights alone and puts them into the next
input quantizer: codes are those of the constant norm, and padding with zeros still means a normalised zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import QuantizationError
from fewbits.layers import BalancedFusion, QuantizedLayer, call, fusion_nodes, in_eval, remove_fusion
from fewbits.layers.consumers import CONVOLUTIONS, Consumers, find_consumers
from fewbits.layers.settle import channel_gains, input_sums, measure_statistics, spread_gains
from fewbits.quantizers import N2UQ, Uniform
from fewbits.quantizers.requantize import Settled, whole_steps

FOLDS = ("requant", "weight")


@dataclass(frozen=True)
class FusionAccuracy:
    """Metrics with the true norm, with constants in its place, folded, and after fine-tuning (None: there was none).

    nodes: what ``fold_fusion`` did to each.
    """

    true_norm: Mapping[str, float]
    constant_norm: Mapping[str, float]
    folded: Mapping[str, float]
    finetuned: Mapping[str, float] | None
    nodes: Mapping[str, str]


def calibrate_fusion(model: nn.Module, batches: Iterable[Any]) -> dict[str, tuple[float, float]]:
    """Put constants in the place of each node's mean and std, in place; return {node: (mu, sigma)}.

    batches: of model inputs, 256 to 512 samples. Node by node in the order of the forward, so that each is measured on
    what the nodes before it will deliver. mu is rounded to whole steps of the (finest) static quantizer behind the
    node, as it will be its zero point. Nodes with constants stay. Raises QuantizationError without batches, or for a
    node that no batch reaches.
    """
    kept = list(batches)
    if not kept:
        raise QuantizationError("calibrate_fusion needs at least one batch, got none")
    nodes = fusion_nodes(model)
    found = find_consumers(model, kept[0])
    if missing := [name for name in nodes if name not in found]:
        raise QuantizationError(f"the first batch does not reach the fusion nodes {missing}: remove them, or others")
    for name, consumers in found.items():
        node = nodes[name]
        if node.settings.norm and not node.constant:
            mean, std = measure_statistics(model, node, kept)
            node.sigma.fill_(std)
            node.mu.fill_(_snapped(model, node, consumers, mean))
            node.constant = True
    return {name: (float(nodes[name].mu), float(nodes[name].sigma)) for name in found}


def fix_fusion(model: nn.Module, batches: Iterable[Any]) -> None:
    """Put constants in the place of each node's mean and std while the model is still trained, in place.

    The weights then settle for the function that is deployed, and folding costs nothing more. The steps of the input
    quantizers behind a node stay from now on, so that mu stays a whole number of them; several layers behind one node
    go on with the step of the first. Arguments and errors: as of ``calibrate_fusion``; a second call changes nothing.
    """
    kept = list(batches)
    if not kept:
        raise QuantizationError("fix_fusion needs at least one batch, got none")
    for consumers in find_consumers(model, kept[0]).values():
        behind: list[Any] = [getattr(model.get_submodule(n), "input_quantizer", None) for n in consumers.layers]
        static = [quantizer for quantizer in behind if _static(quantizer)]
        for quantizer in static:
            if quantizer.plan == static[0].plan:
                quantizer.load_state_dict(static[0].state_dict())
            quantizer.requires_grad_(False)
    calibrate_fusion(model, kept)


def _snapped(model: nn.Module, node: BalancedFusion, consumers: Consumers, mean: float) -> Tensor:
    """Return the mean in whole steps of the finest quantizer behind the node; as it is where there is none."""
    mu = torch.tensor(mean, device=node.mu.device)
    quantizers: list[Any] = [getattr(model.get_submodule(n), "input_quantizer", None) for n in consumers.layers]
    steps = [q.affine()[0].detach().min() for q in quantizers if _static(q)]
    if not steps:
        return mu
    step = torch.stack(steps).min()
    return whole_steps(mu, node.sigma, step) * (node.sigma * step)


def _static(quantizer: Any) -> bool:
    """Tell whether a quantizer can take a fusion in: one static uniform step."""
    if not isinstance(quantizer, Uniform) or isinstance(quantizer, (N2UQ, Settled)):
        return False
    return quantizer.groups == 1 and quantizer.grid.step == 1 and bool(quantizer.calibrated)


def fold_fusion(model: nn.Module, batches: Iterable[Any], how: str = "requant") -> dict[str, str]:
    """Fold every fusion node into the layers behind it, in place, before ``pack``; return what was done, by node.

    Nodes without constants get them first (``calibrate_fusion``). "requant": equal to the model with constant norms but
    for float rounding at the edge between two codes, and, where several layers with steps of their own are behind a
    node, for the mean, which each rounds to its own steps; a layer with a float input gets "weight". "weight": equal in
    real numbers; the layer's quantizers are calibrated anew on ``batches``, since gains change codes. A node stays,
    with its constants as one multiply-add, where it cannot be folded: its result goes to something else than layers,
    the input quantizer is dynamic or per channel, zeros pad what "weight" would fold, or an add has unequal gains.
    Afterwards the plain operator is back. Fine-tune then, briefly, on the task loss alone (Adam, lr 2e-5), and pack.
    """
    if how not in FOLDS:
        raise QuantizationError(f"how to fold a fusion must be one of {FOLDS}, got {how!r}")
    kept = list(batches)
    calibrate_fusion(model, kept)
    nodes, done = fusion_nodes(model), {}
    for name, consumers in find_consumers(model, kept[0]).items():
        node = nodes[name]
        layers = [(layer, model.get_submodule(layer)) for layer in consumers.layers]
        if not node.settings.norm and node.settings.mode == "off":
            done[name] = "plain"
            remove_fusion(model, [name])
            continue
        ways = {layer: _way(module, how) for layer, module in layers}
        reason = _why_not(node, consumers) or next((w for w in ways.values() if w not in FOLDS), None)
        if reason is not None:
            done[name] = f"kept: {reason}"
            continue
        gains = channel_gains(node, consumers.widths)
        remove_fusion(model, [name])
        for layer, module in layers:
            (_requantize if ways[layer] == "requant" else _into_weight)(module, gains, node.mu, node.sigma)
        weighted = [module for layer, module in layers if ways[layer] == "weight"]
        _recalibrate(model, [m for m in weighted if isinstance(m, QuantizedLayer)], kept)
        done[name] = ", ".join(f"{way} into {layer}" for layer, way in ways.items())
    return done


def _why_not(node: BalancedFusion, consumers: Consumers) -> str | None:
    if consumers.other or not consumers.layers:
        return f"its result goes to {', '.join(consumers.other) or 'no layer'}"
    if consumers.shared:
        return f"{', '.join(consumers.shared)} also runs on something else"
    gains = node.gains.detach()
    if node.op == "add" and not torch.allclose(gains, gains.mean(), rtol=1e-3):
        return "an add with unequal gains"
    return None


def _way(layer: Any, how: str) -> str:
    """Return "requant" or "weight", or why the layer can have neither."""
    quantizer = getattr(layer, "input_quantizer", None)
    if how == "requant" and quantizer is not None:
        enough = isinstance(quantizer, N2UQ) and quantizer.plan.bits > 1  # one threshold has no slope to train with
        if _static(quantizer) or (enough and quantizer.calibrated):
            return "requant"
        return f"the input quantizer {quantizer.plan.quantizer!r} cannot take it in"
    one_tap = not isinstance(layer, CONVOLUTIONS) or set(layer.kernel_size) == {1}
    if isinstance(layer, CONVOLUTIONS):
        pads = layer.padding_mode == "zeros" and layer.padding != "valid" and layer.padding != (0,) * len(layer.padding)
        if pads or (layer.transposed and not one_tap):
            return "zeros at the border would be no normalised zeros"
    return "weight"


def _requantize(layer: Any, gains: Tensor, mu: Tensor, sigma: Tensor) -> None:
    """Give a layer the input quantizer that does gains and constants, too."""
    old: Uniform = layer.input_quantizer
    options = {"narrow": old.grid.lowest == -old.grid.highest} if old.plan.symmetric else {}
    kind = "rethreshold" if isinstance(old, N2UQ) else "requantize"
    plan = replace(old.plan, quantizer=kind, options=options)
    new = layer.make_input_quantizer(plan).train(old.training)
    one = bool((gains == gains[0]).all())
    new.take_over(old, gains[:1] if one else gains, sigma, mu)
    layer.input_quantizer, layer.layer_plan = new, replace(layer.layer_plan, input=plan)


@torch.no_grad()
def _into_weight(layer: Any, gains: Tensor, mu: Tensor, sigma: Tensor) -> None:
    """W' = W a / sigma, b' = b - mu / sigma sum(W), eq. 12 and 18-22 with the gains."""
    shift = -mu / sigma * input_sums(layer, torch.ones_like(gains))
    layer.weight.mul_(spread_gains(layer, gains / sigma))
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.to(layer.weight.dtype))
    else:
        layer.bias.add_(shift)


def _recalibrate(model: nn.Module, layers: Sequence[QuantizedLayer], batches: Sequence[Any]) -> None:
    """Take the ranges of these layers' weights and inputs anew."""
    for layer in layers:
        if layer.weight_quantizer is not None:
            layer.weight_quantizer.reset()
            layer.weight_quantizer.calibrate(getattr(layer, layer.weight_name).detach())
        if layer.input_quantizer is not None:
            layer.input_quantizer.reset()
            layer.mode = "observe"
    if any(layer.mode == "observe" for layer in layers):
        with in_eval(model), torch.no_grad():
            for batch in batches:
                call(model, batch)
    for layer in layers:
        layer.mode = "quantize"


def fold_and_measure(
    model: nn.Module,
    batches: Iterable[Any],
    evaluate: Callable[[nn.Module], Mapping[str, float]],
    *,
    how: str = "requant",
    finetune: Callable[[nn.Module], None] | None = None,
) -> FusionAccuracy:
    """Calibrate and fold the fusion nodes of a model in place, fine-tune it, and evaluate before and after each.

    Nodes that had constants while they were trained keep those; with their true norm such a model was not trained.
    evaluate: of a model in eval mode, without gradients. finetune: trains the folded model in place; of the task loss
    alone, with Adam at lr 2e-5, in the paper.
    """
    kept = list(batches)

    def measured() -> dict[str, float]:
        with in_eval(model), torch.no_grad():
            return dict(evaluate(model))

    fixed = [node for node in fusion_nodes(model).values() if node.constant]
    for node in fixed:
        node.constant = False
    true = measured()
    for node in fixed:
        node.constant = True
    calibrate_fusion(model, kept)
    constant = measured()
    done = fold_fusion(model, kept, how)
    folded = measured()
    if finetune is not None:
        finetune(model)
    return FusionAccuracy(true, constant, folded, None if finetune is None else measured(), done)
