"""fewbits, through its public names only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from .sites import LAYER_TYPES, Prepared, Widths, find_sites


def fewbits_arm(
    model: nn.Module, widths: Widths, batches: Sequence[Tensor], *, quantizer: str, act_quantizer: str | None = None
) -> Prepared:
    """One quantizer for all weights and inputs; the first and the last layer at their own width, and not sparse.

    "denoise": affine weights per channel (linear where sparse). act_quantizer: a dynamic one, for inputs below 8 bits
    in blocks of 128 channels of each position; None: as ``uniform_plan`` has it. In place of "denoise", "mean" takes
    the step of up to 4 bits from the mean magnitude, and "masked" that of one bit, with no gradient through what it
    clips. The rules for attention's matmuls are taken out of the plan: no peer quantizes those here.
    """
    import fewbits as fb
    from fewbits.train.optim import parameter_groups

    sites = find_sites(model, widths, batches)
    names = [site.name for site in sites]
    uniform = quantizer if quantizer in ("lsq", "ste") else "lsq"
    plan = fb.uniform_plan(model, widths.weight, widths.act, first_last=widths.first_last, quantizer=uniform)
    plan = fb.Plan(tuple(rule for rule in plan if rule[0] in names), plan.decided_from)
    for name in names[1:-1]:
        plan = plan.override((name, _inner(dict(plan.rules)[name], widths, quantizer, act_quantizer)))
    fb.quantize(model, plan, verbose=False)
    fb.calibrate(model, list(batches))
    left = {site.name: "not in the plan" for site in sites if type(site.layer) in LAYER_TYPES}
    quantized = [name for name in names if name not in left]
    told = f"quantizer={quantizer}" + (f", inputs={act_quantizer}" if act_quantizer else "")
    return Prepared(model, quantized, left, told, partial(parameter_groups, model))


def _inner(layer: Any, widths: Widths, quantizer: str, act_quantizer: str | None) -> Any:
    """Return the plan of a layer between the first and the last."""
    weight, act = layer.weight, layer.input
    if quantizer in ("denoise", "masked", "mean"):
        weight = _plan(quantizer, widths.weight, symmetric=widths.sparsity is not None, granularity="channel")
    if act_quantizer is not None and widths.act < 8:
        act = _plan(act_quantizer, widths.act, symmetric=False, granularity="block", block=128)
    weight = dataclasses.replace(weight, sparsity=widths.sparsity)
    return dataclasses.replace(layer, weight=weight, input=act)


def _plan(quantizer: str, bits: int, **fields: Any) -> Any:
    from fewbits import TensorPlan

    options: dict[str, Any] = {}
    if quantizer == "masked" and bits == 1:
        options = {"range": "absmean", "clip": "mask"}
    elif quantizer == "mean" and bits <= 4:
        options = {"range": "absmean"}
    return TensorPlan(bits, "denoise" if quantizer in ("masked", "mean") else quantizer, options=options, **fields)
