"""fewbits, through its public names only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from .sites import LAYER_TYPES, Prepared, Widths, find_sites


def fewbits_arm(model: nn.Module, widths: Widths, batches: Sequence[Tensor], *, quantizer: str) -> Prepared:
    """One quantizer for all weights and inputs; the first and the last layer at their own width, and not sparse.

    "denoise": affine weights per channel (linear where sparse), inputs in blocks of 128 channels of each position;
    inputs of 8 bits, and the edges, are ``lsq``. The rules for attention's matmuls are taken out of the plan: no peer
    quantizes those here.
    """
    import fewbits as fb
    from fewbits.train.optim import parameter_groups

    sites = find_sites(model, widths, batches)
    names = [site.name for site in sites]
    uniform = "lsq" if quantizer == "denoise" else quantizer
    plan = fb.uniform_plan(model, widths.weight, widths.act, first_last=widths.first_last, quantizer=uniform)
    plan = fb.Plan(tuple(rule for rule in plan if rule[0] in names), plan.decided_from)
    for name in names[1:-1]:
        plan = plan.override((name, _inner(dict(plan.rules)[name], widths, quantizer)))
    fb.quantize(model, plan, verbose=False)
    fb.calibrate(model, list(batches))
    left = {site.name: "not in the plan" for site in sites if type(site.layer) in LAYER_TYPES}
    quantized = [name for name in names if name not in left]
    return Prepared(model, quantized, left, f"quantizer={quantizer}", partial(parameter_groups, model))


def _inner(layer: Any, widths: Widths, quantizer: str) -> Any:
    """Return the plan of a layer between the first and the last."""
    from fewbits import TensorPlan

    weight, act = layer.weight, layer.input
    if quantizer == "denoise":
        affine = widths.sparsity is None
        weight = TensorPlan(widths.weight, "denoise", symmetric=not affine, granularity="channel")
        if widths.act < 8:
            act = TensorPlan(widths.act, "denoise", symmetric=False, granularity="block", block=128)
    weight = dataclasses.replace(weight, sparsity=widths.sparsity)
    return dataclasses.replace(layer, weight=weight, input=act)
