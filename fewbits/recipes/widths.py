"""Learned widths in a run: the hook that trains them to a mean or to an energy."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fewbits.cost import Hardware, ModelShape, bit_prices
from fewbits.errors import BudgetError
from fewbits.plan import Plan
from fewbits.recipes.schema import LearnedBits
from fewbits.train import LearnBits
from fewbits.train.bits import learnable


def learn_bits(model: nn.Module, rules: LearnedBits, plan: Plan, shape: Callable[[], ModelShape]) -> LearnBits:
    """Return the hook of a quantized model. shape: of the model with one image, for an energy.

    Raises BudgetError for an energy that the narrowest widths exceed, HardwareError as of ``bit_prices``.
    """
    if rules.average_bits is not None:
        return LearnBits(rules.average_bits, lr=rules.lr, freeze_at=rules.freeze_at)
    assert rules.energy_uj is not None and rules.hardware is not None
    widths = learnable(model)
    lowest, highest = min(q.lowest for q in widths.values()), max(q.highest for q in widths.values())
    found = bit_prices(model, plan, shape(), Hardware.load(rules.hardware), widths, lowest, highest)
    least, most = (found.energy(dict.fromkeys(widths, bits)) for bits in (lowest, highest))
    if rules.energy_uj < least:
        raise BudgetError(
            f"learned_bits.energy_uj={rules.energy_uj:g} is out of reach: the model takes {least:.4g} microjoules on "
            f"{rules.hardware} with {lowest} bits everywhere, {most:.4g} with {highest}; raise it, or lower act_bits"
        )
    mean = min(found.mean_bits(rules.energy_uj), highest)
    return LearnBits(mean, lr=rules.lr, freeze_at=rules.freeze_at, prices=found.prices)
