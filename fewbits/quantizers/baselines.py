"""What the denoising quantizer is compared with: dynamic STE, BitNet and ParetoQ. STE on the ridge forward is
``denoise`` with gradient="ste"."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fewbits.errors import PlanError
from fewbits.plan import TensorPlan
from fewbits.quantizers.base import register_quantizer
from fewbits.quantizers.codes import make_grid
from fewbits.quantizers.dynamic import HUGE, Dynamic, Fit, Rule, bounded, largest, mean_magnitude, spread, to_grid
from fewbits.quantizers.grouping import Grouping
from fewbits.quantizers.ranges import TINY
from fewbits.quantizers.sparsity import prune
from fewbits.quantizers.uniform import LSQ


class MinMax(Rule):
    """y = s q + b: codes 0..highest from the smallest to the largest value of a row, dequantized the ordinary way."""

    def fit(self, x: Tensor, pruned: Tensor | None) -> Fit:
        """Return codes, step and smallest value."""
        f, step, low = spread(x, self.grid)
        return Fit(f.round_(), *bounded(step, low, self.grid))


class AbsMax(Rule):
    """y = s q: the largest magnitude of a row gets the outermost code; at one bit s = mean|x| and q = sign(x)."""

    def fit(self, x: Tensor, pruned: Tensor | None) -> Fit:
        """Return codes and scale."""
        if self.grid.bits > 1:
            scale = (largest(x) / self.grid.highest).clamp_(min=TINY)
        elif pruned is None:
            scale = mean_magnitude(x)
        else:  # of what is left
            kept = (~pruned).sum(-1, keepdim=True).clamp_(min=1)
            scale = mean_magnitude(prune(x, pruned)) * (x.shape[-1] / kept)
        values = prune(to_grid(x / scale, self.grid), pruned)
        return Fit(values, scale.clamp_(max=HUGE / self.grid.highest), None)


class Sign(Rule):
    """y = sign(x - mean x) * mean|x| (BitNet b1: Wang et al. 2023, "BitNet", eq. 1-3)."""

    def fit(self, x: Tensor, pruned: Tensor | None) -> Fit:
        """Return signs and scale."""
        mean = (x / x.shape[-1]).sum(-1, keepdim=True)
        return Fit(to_grid(x - mean, self.grid), mean_magnitude(x), None)


class AbsMean(Rule):
    """y = s clip(round(x / s), -1, 1), s = mean|x| (BitNet b1.58: Ma et al. 2024, "The Era of 1-bit LLMs", eq. 1-3)."""

    def fit(self, x: Tensor, pruned: Tensor | None) -> Fit:
        """Return ternary codes and scale."""
        scale = mean_magnitude(x)
        return Fit(to_grid(x / scale, self.grid), scale, None)


@register_quantizer("dynamic")
class DynamicSTE(Dynamic):
    """Straight-through with the range of each tensor anew, and the ordinary dequantizer on the grids of ``denoise``.

    Affine from the smallest to the largest value, or symmetric by the largest magnitude (one bit: the mean magnitude).
    """

    def __init__(self, plan: TensorPlan, grouping: Grouping, groups: int) -> None:
        grid = make_grid(plan.bits, symmetric=plan.symmetric, narrow=True)
        super().__init__(plan, grouping, groups, AbsMax(grid) if plan.symmetric else MinMax(grid))


@register_quantizer("bitnet")
class BitNet(Dynamic):
    """Weights of BitNet, per tensor in the papers: 1 bit is b1, 2 bits is the ternary b1.58. Straight-through.

    Its activations are ``dynamic``, symmetric, 8 bits, with a block as long as the axis (one scale a token).
    """

    has_offset = False
    can_prune = False

    def __init__(self, plan: TensorPlan, grouping: Grouping, groups: int) -> None:
        if plan.bits > 2 or not plan.symmetric:
            raise PlanError(
                "quantizer 'bitnet' is for weights of 1 bit, or 2 (ternary), with symmetric=True; for activations use "
                f"'dynamic'; got bits={plan.bits}, symmetric={plan.symmetric}"
            )
        grid = make_grid(plan.bits, symmetric=True, narrow=True)
        super().__init__(plan, grouping, groups, Sign(grid) if plan.bits == 1 else AbsMean(grid))


@register_quantizer("paretoq")
class ParetoQ(LSQ):
    """y = alpha sign(x) with a learned alpha (Liu et al. 2025, "ParetoQ", its 1-bit form; wider codes: ``lsq``).

    As LSQ at one bit, but gradient reaches x only where |x / alpha| <= 1, and that of alpha is scaled by
    1 / sqrt(values of the whole tensor * Q_p). alpha starts as mean|x|, the best fit.
    """

    def __init__(self, plan: TensorPlan, grouping: Grouping, groups: int, **options: Any) -> None:
        if plan.bits != 1 or not plan.symmetric:
            raise PlanError(
                "quantizer 'paretoq' is its 1-bit form, symmetric=True; for more bits use 'lsq'; got "
                f"bits={plan.bits}, symmetric={plan.symmetric}"
            )
        super().__init__(plan, grouping, groups, **options)

    @property
    def reach(self) -> float:
        """Gradient passes up to alpha."""
        return 0.0

    def gradient_factor(self, x: Tensor) -> float:
        """Return 1 / sqrt(values * Q_p), Q_p = 1."""
        return float(x.numel() ** -0.5)
