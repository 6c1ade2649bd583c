"""The denoising quantizer: plain codes, and a ridge regression back to the original values ("Robust Training of Neural
Networks at Arbitrary Precision and Sparsity", arXiv 2409.09245). The maths is in ``ridge``."""

from __future__ import annotations

import math

from fewbits.errors import PlanError
from fewbits.plan import TensorPlan
from fewbits.quantizers.base import register_quantizer
from fewbits.quantizers.codes import make_grid
from fewbits.quantizers.dynamic import Dynamic
from fewbits.quantizers.grouping import Grouping
from fewbits.quantizers.ridge import Ridge

GRADIENTS = ("denoise", "gain", "ste")
CLIPS = ("noise", "mask")
RANGES = {False: ("minmax", "absmean"), True: ("absmax", "absmean")}  # by symmetric; the first is the default


@register_quantizer("denoise")
class Denoise(Dynamic):
    """Affine (symmetric=False): codes 0..2**bits - 1, scale and real offset. Linear (symmetric=True): scale only; one
    bit is {-1, 1}, two bits are ternary {-1, 0, 1}, b bits are -M..M with M = 2**(b - 1) - 1.

    Statistics are those of each block (the paper: 128 along the contraction axis), channel, head or tensor; a block at
    least as long as the axis is one row a token, or one a weight's output channel. Options:

    lam: the ridge penalty, above 0; 0.01 is the paper's value for every bit width. range: what a block spans before
    rounding: "minmax" (affine), "absmax" (linear), or "absmean" (up to 4 bits). That one takes its step from the mean
    magnitude: about the mean, the best step for a normal distribution, where affine; BitNet b1.58's for ternary
    (linear). The gain a / s of its gradient is about 1, that of the others 0.3 at one bit. odd: the linear grid {..,
    -3, -1, 1, 3, ..}, whose steps of 2 make lam weigh a quarter. detach_range: no gradient through the range.
    gradient: "denoise"; "gain", the slope detached; "ste", the same forward with an identity backward. clip, for
    "absmean", which alone clips: "noise", an error like that of rounding; "mask" (ours), no gradient through the
    codes of what lies beyond the cells of the outermost ones.
    """

    def __init__(
        self,
        plan: TensorPlan,
        grouping: Grouping,
        groups: int,
        *,
        lam: float = 0.01,
        range: str | None = None,
        odd: bool = False,
        detach_range: bool = False,
        gradient: str = "denoise",
        clip: str = "noise",
    ) -> None:
        if isinstance(lam, bool) or not isinstance(lam, (int, float)) or not 0 < lam < math.inf:
            raise PlanError(
                f"lam must be a number above 0, got {lam!r}: at 0 a block of equal values is 0 / 0; 0.01 is usual"
            )
        if gradient not in GRADIENTS:
            raise PlanError(f"gradient must be one of {GRADIENTS}, got {gradient!r}")
        known = RANGES[plan.symmetric]
        range = known[0] if range is None else range
        if range not in known:
            raise PlanError(f"range must be one of {known} where symmetric={plan.symmetric}, got {range!r}")
        if odd and not plan.symmetric:
            raise PlanError("an odd grid has no offset: use symmetric=True with odd=True")
        grid = make_grid(plan.bits, symmetric=plan.symmetric, narrow=True, odd=odd)
        if range == "absmean" and (plan.bits > 4 or (plan.symmetric and grid.highest > 1)):
            raise PlanError(
                "range='absmean' is for up to 4 bits where affine, for 1 bit and ternary (2) where symmetric; got "
                f"bits={plan.bits}, symmetric={plan.symmetric}, odd={odd}"
            )
        if clip not in CLIPS or (clip == "mask" and (range != "absmean" or gradient == "ste")):
            raise PlanError(
                f"clip must be one of {CLIPS}, and 'mask' is for range='absmean' with a gradient of its own; got "
                f"clip={clip!r}, range={range!r}, gradient={gradient!r}"
            )
        rule = Ridge(grid, float(lam), range == "absmean", detach_range, gradient, clip == "mask")
        super().__init__(plan, grouping, groups, rule)
