"""fewbits, through its public names only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from .sites import LAYER_TYPES, Prepared, Widths, find_sites


def fewbits_arm(model: nn.Module, widths: Widths, batches: Sequence[Tensor], *, quantizer: str) -> Prepared:
    """One quantizer (``lsq`` or ``ste``) for all weights and inputs, first and last layer at their own width.

    The rules for attention's matmuls are taken out of the plan: no peer quantizes those here.
    """
    import fewbits as fb
    from fewbits.train.optim import parameter_groups

    sites = find_sites(model, widths, batches)
    names = [site.name for site in sites]
    plan = fb.uniform_plan(model, widths.weight, widths.act, first_last=widths.first_last, quantizer=quantizer)
    plan = fb.Plan(tuple(rule for rule in plan if rule[0] in names), plan.decided_from)
    fb.quantize(model, plan, verbose=False)
    fb.calibrate(model, list(batches))
    left = {site.name: "not in the plan" for site in sites if type(site.layer) in LAYER_TYPES}
    quantized = [name for name in names if name not in left]
    return Prepared(model, quantized, left, f"quantizer={quantizer}", partial(parameter_groups, model))
