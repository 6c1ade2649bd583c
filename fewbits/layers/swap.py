"""Quantize a model in place, calibrate it, and undo it; no tracing, any nn.Module."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import PlanError, QuantizationError, nearest
from fewbits.layers.base import QuantizedLayer, activation_quantizers, twin_class
from fewbits.layers.intercept import wrap_owners
from fewbits.layers.watch import Watch
from fewbits.plan import LayerPlan, Plan, TensorPlan
from fewbits.quantizers import Quantizer


@dataclass(frozen=True)
class LayerReport:
    """One row of the printed table: a module, and how it is quantized (``plan``) or why not (``reason``)."""

    name: str
    kind: str
    plan: LayerPlan | None
    reason: str


def float_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of the module before it was quantized."""
    return module.float_class if isinstance(module, QuantizedLayer) else type(module)


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """Return every layer that has weights or matmuls to quantize, quantized now or not; shared modules once."""
    return {name: m for name, m in model.named_modules() if (t := _twin(m)) and not t.only_output}


def output_only(model: nn.Module) -> dict[str, nn.Module]:
    """Return every layer of which only the result can be quantized (batch norms), by name."""
    return {name: m for name, m in model.named_modules() if (t := _twin(m)) and t.only_output}


def _twin(module: nn.Module) -> type[QuantizedLayer] | None:
    """Return the twin of a module, but None where its own ``forward`` attribute would hide the twin's."""
    return None if "forward" in vars(module) else twin_class(float_class(module))


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the layers that are quantized now, by name; shared modules once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def quantize(model: nn.Module, plan: Plan, *, verbose: bool = True) -> nn.Module:
    """Quantize the layers that the plan names, in place, and return the same model.

    Prints a table of what was and was not quantized, and why, unless verbose is False. A layer that is quantized
    already is quantized anew. Raises PlanError for a rule that matches nothing or names a module that has no
    twin, and QuantizationError, naming the layer, for weights that are not finite. On error the model is as before.
    """
    layers = quantizable(model) | output_only(model)
    _check_names(model, plan, layers)
    decided = plan.resolve(quantizable(model), output_only(model), lambda name, given: supported(layers[name], given))
    weights = _weight_quantizers(layers, decided)
    with _all_or_nothing(layers.values()):
        for name, layer_plan in decided.items():
            layer = layers[name]
            if isinstance(layer, QuantizedLayer):
                _swap_out(layer)
            if layer_plan is not None and layer_plan != LayerPlan():
                _swap_in(name, layer, layer_plan, weights.get(name))
        wrap_owners(model)
    if verbose:
        print_table(model)
    return model


def supported(layer: nn.Module, plan: LayerPlan) -> LayerPlan:
    """Return the part of a plan that this type of layer has: what a glob rule means for it."""
    twin = twin_class(float_class(layer))
    assert twin is not None
    return dataclasses.replace(
        plan,
        weight=plan.weight if layer_weight(layer) is not None else None,
        input=plan.input if twin.quantizes_input else None,
        operands=plan.operands if twin.quantizes_operands else None,
    )


def dequantize(model: nn.Module) -> nn.Module:
    """Turn every quantized layer back into its float class, in place; weights keep their present float values."""
    for layer in quantized_layers(model).values():
        _swap_out(layer)
    return model


def calibrate(model: nn.Module, batches: Iterable[Any], *, only: Collection[str] | None = None) -> nn.Module:
    """Set the range of every input quantizer from batches of model inputs; the layers run in float meanwhile.

    A batch is a tensor, or a tuple or dict of arguments of ``model``. only: names of the layers to calibrate; the
    others keep their ranges and run as they do now, quantized or in float. Raises QuantizationError if there are no
    batches, or, naming the layer, if an activation is not finite or if the weight of a layer is read without calling
    the layer; warns of layers that no batch reached.
    """
    layers, batches = _chosen(quantized_layers(model), only), iter(batches)
    first = next(batches, None)
    if first is None:
        raise QuantizationError("calibrate needs at least one batch, got none")
    for layer in layers.values():
        for quantizer in activation_quantizers(layer):
            quantizer.reset()
    with in_eval(model), _in_mode(layers.values(), "observe"), Watch(layers) as watch, torch.no_grad():
        for batch in itertools.chain([first], batches):
            call(model, batch)
    watch.refuse_reads()
    watch.warn_unreached(stacklevel=2)
    return model


def _chosen(layers: dict[str, QuantizedLayer], only: Collection[str] | None) -> dict[str, QuantizedLayer]:
    unknown = [] if only is None else [name for name in only if name not in layers]
    if unknown:
        raise QuantizationError(f"no quantized layer {unknown[0]!r} to calibrate{nearest(unknown[0], layers)}")
    return layers if only is None else {name: layers[name] for name in only}


def call(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: a tensor, a tuple of positional or a mapping of keyword arguments."""
    if isinstance(batch, Tensor):
        return model(batch)
    return model(**batch) if hasattr(batch, "keys") else model(*batch)


@contextlib.contextmanager
def set_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Run every quantized layer as "quantize", "observe" or "float" inside the block."""
    if mode not in ("quantize", "observe", "float"):
        raise QuantizationError(f"mode must be 'quantize', 'observe' or 'float', got {mode!r}")
    with _in_mode(quantized_layers(model).values(), mode):
        yield


@contextlib.contextmanager
def _in_mode(chosen: Iterable[QuantizedLayer], mode: str) -> Iterator[None]:
    layers = list(chosen)
    before = [layer.mode for layer in layers]
    for layer in layers:
        layer.mode = mode
    try:
        yield
    finally:
        for layer, old in zip(layers, before):
            layer.mode = old


def report_layers(model: nn.Module) -> list[LayerReport]:
    """Tell for every module with parameters of its own how it is quantized, or why it is not."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            continue
        has_parameters = bool(module._parameters) and any(p is not None for p in module._parameters.values())
        if isinstance(module, QuantizedLayer) and module.layer_plan != LayerPlan():
            rows.append(LayerReport(name, module.float_class.__name__, module.layer_plan, ""))
        elif has_parameters:
            rows.append(LayerReport(name, type(module).__name__, None, _reason(module)))
    return rows


def print_table(model: nn.Module) -> None:
    """Print ``report_layers`` as a table; names are never cut, and rows of usual models fit into 80 columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for header in ("layer", "type"):
        table.add_column(header, overflow="fold")
    table.add_column("bits, or why it is in float", ratio=1)
    for row in report_layers(model):
        plan = row.plan or LayerPlan()
        tensors = {"weight": plan.weight, "input": plan.input, "operands": plan.operands, "output": plan.output}
        how = ", ".join(f"{name} {describe(t, unit='')}" for name, t in tensors.items() if t is not None)
        table.add_row(row.name or "(model)", row.kind, how or f"float: {row.reason}", style=None if how else "dim")
    Console().print(table)


def describe(plan: TensorPlan | None, unit: str = " bit") -> str:
    """Return a tensor plan in a few words, e.g. ``4 bit lsq channel``; per tensor where it does not say."""
    if plan is None:
        return "float"
    one = "" if plan.granularity == "tensor" else f" {plan.granularity}"
    block = f" {plan.block}" if plan.block else ""
    affine = "" if plan.symmetric else " affine"
    sparse = f" {plan.sparsity}" if plan.sparsity else ""
    return f"{plan.mean_bits:g}{unit} {plan.quantizer}{one}{block}{affine}{sparse}"


def _reason(module: nn.Module) -> str:
    twin = twin_class(type(module))
    if "forward" in vars(module):
        return "its forward was replaced on the instance: quantize first, or undo that"
    if twin is not None:
        return "a norm: folded when packed" if twin.only_output else "left in float by the plan"
    base = next((b for b in type(module).__mro__[1:] if twin_class(b) is not None), None)
    if base is not None:
        return f"overrides forward of {base.__name__}: register a twin for it"
    return "no quantized twin for this type"


def _check_names(model: nn.Module, plan: Plan, layers: dict[str, nn.Module]) -> None:
    modules = dict(model.named_modules())
    for pattern, _ in plan:
        if pattern in modules and pattern not in layers:
            kind = type(modules[pattern]).__name__
            raise PlanError(
                f"layer {pattern!r} cannot be quantized: {_reason(modules[pattern])} ({kind}){nearest(pattern, layers)}"
            )


def layer_weight(layer: nn.Module) -> nn.Parameter | None:
    """Return the parameter of a quantizable layer that its twin quantizes."""
    twin = twin_class(float_class(layer))
    return None if twin is None else getattr(layer, twin.weight_name, None)


def _weight_quantizers(layers: dict[str, nn.Module], decided: dict[str, LayerPlan | None]) -> dict[str, Quantizer]:
    """Build the weight quantizers; layers that share a weight share its quantizer."""
    weights = {name: w for name, layer in layers.items() if (w := layer_weight(layer)) is not None}
    first: dict[int, str] = {}  # by id, so ``weights`` holds on to those that a layer computes anew on each access
    plans: dict[str, TensorPlan | None] = {}
    shared = {id(w): _kept_quantizer(layers[name]) for name, w in weights.items() if name not in decided}
    built: dict[str, Quantizer] = {}
    for name, weight in weights.items():
        layer = layers[name]
        plans[name] = _planned_weight(layer, decided.get(name), name in decided)
        owner = first.setdefault(id(weight), name)
        if plans[owner] != plans[name]:
            raise PlanError(
                f"layers {owner!r} and {name!r} share one weight but have different plans for it "
                f"({describe(plans[owner])} and {describe(plans[name])}): give both the same"
            )
        plan = plans[name]
        if plan is not None and name in decided:
            built[name] = shared[id(weight)] = shared.get(id(weight)) or _build(name, layer, weight, plan)
    return built


def _planned_weight(layer: nn.Module, plan: LayerPlan | None, decided: bool) -> TensorPlan | None:
    if not decided and isinstance(layer, QuantizedLayer):
        plan = layer.layer_plan  # it stays as it is
    return None if plan is None else plan.weight


def _kept_quantizer(layer: nn.Module) -> Quantizer | None:
    return layer.weight_quantizer if isinstance(layer, QuantizedLayer) else None


def _build(name: str, layer: nn.Module, weight: Tensor, plan: TensorPlan) -> Quantizer:
    twin = twin_class(float_class(layer))
    assert twin is not None
    if nn.parameter.is_lazy(weight):
        raise QuantizationError(f"layer {name!r} has no weight yet: run a batch through the float model first")
    try:
        return twin.make_weight_quantizer(weight, plan)
    except (PlanError, QuantizationError) as error:
        raise type(error)(f"weight of layer {name!r}: {error}") from error


def _swap_in(name: str, layer: nn.Module, plan: LayerPlan, weight_quantizer: Quantizer | None) -> None:
    twin = twin_class(type(layer))
    assert twin is not None
    layer.__class__ = twin
    try:
        layer.attach(plan, weight_quantizer)  # type: ignore[operator]
    except (PlanError, QuantizationError) as error:
        raise type(error)(f"layer {name!r}: {error}") from error
    for role, child in layer.named_children():
        if isinstance(child, Quantizer):
            child.train(layer.training)
            child.label = child.label or f"{role.removesuffix('_quantizer')} of layer {name!r}: "


def _swap_out(layer: QuantizedLayer) -> None:
    for name in [n for n, m in layer._modules.items() if isinstance(m, Quantizer) or n.endswith("_quantizer")]:
        del layer._modules[name]
    for name in [n for n in vars(layer) if n in ("layer_plan", "mode") or n.endswith("_quantizer")]:
        del layer.__dict__[name]
    layer.__class__ = layer.float_class  # type: ignore[assignment]


@contextlib.contextmanager
def _all_or_nothing(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Give the layers their classes, attributes and children back if the block fails."""
    before = [(layer, type(layer), dict(vars(layer)), dict(layer._modules)) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, cls, attributes, children in before:
            layer.__class__ = cls
            for kept, old in ((vars(layer), attributes), (attributes["_modules"], children)):
                kept.clear()
                kept.update(old)
        raise


@contextlib.contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Evaluate inside the block; after it each module trains or not as before (frozen batch norms do not)."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
