"""Size: the bytes of the tensors in the packed file, to the byte."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fewbits.cost.shapes import LayerShape, ModelShape
from fewbits.plan import LayerPlan, Plan, TensorPlan
from fewbits.quantizers import QUANTIZERS, Grouping

FLOAT = LayerPlan()
WORD = 4  # bytes of a scale (float32), of a zero point (int32, or float32 where learned)


@dataclass(frozen=True)
class LayerSize:
    """Bytes of one layer. bits: of a weight code, or of a float weight. codes: with the positions of sparse ones.
    floats: the weight where it stays in float, the bias, and a batch norm that could fold into the layer but does not.
    """

    name: str
    kind: str
    bits: float
    codes: int
    scales: int
    floats: int

    @property
    def total(self) -> int:
        """All bytes of the layer."""
        return self.codes + self.scales + self.floats


@dataclass(frozen=True)
class Size:
    """Bytes of a model under a plan. rest: what no layer's row counts, e.g. layer norms and position embeddings."""

    layers: tuple[LayerSize, ...]
    rest: int
    average_weight_bits: float

    @property
    def codes(self) -> int:
        """Bytes of bit-packed codes."""
        return sum(layer.codes for layer in self.layers)

    @property
    def scales(self) -> int:
        """Bytes of scales and zero points, of weights and of activations."""
        return sum(layer.scales for layer in self.layers)

    @property
    def floats(self) -> int:
        """Bytes of everything else."""
        return self.rest + sum(layer.floats for layer in self.layers)

    @property
    def total(self) -> int:
        """All bytes."""
        return self.codes + self.scales + self.floats


def size(plan: Plan, shape: ModelShape) -> Size:
    """Return the bytes that a plan takes, layer by layer.

    Raises PlanError for a rule that matches no layer. A shape that was taken with an example counts every batch norm
    that directly follows a quantized layer as folded, as ``pack`` does when it is given an example.
    """
    decided = shape.resolve(plan)
    rows = tuple(layer_size(layer, decided.get(layer.name) or FLOAT) for layer in shape.layers)
    outputs = sum(activation_bytes((decided.get(name) or FLOAT).output) for name in shape.outputs)
    return Size(rows, fixed_bytes(shape) + outputs, average_weight_bits(decided, shape))


def fixed_bytes(shape: ModelShape) -> int:
    """Return the bytes of a model that no layer's row counts, whatever the plan."""
    return shape.float_bytes - sum(layer.bias * layer.itemsize + layer.norm_bytes for layer in shape.layers)


def layer_size(layer: LayerShape, plan: LayerPlan) -> LayerSize:
    """Return the bytes of one layer under its own plan; sums of these are the size of a plan."""
    activations = (
        activation_bytes(plan.input if layer.has_input else None, layer.input_channels)
        + activation_bytes(plan.output)
        + operand_bytes(plan.operands, layer.heads, layer.operands)
    )
    floats = layer.bias * layer.itemsize + layer.norm_bytes
    if plan.weight is None:
        weight = 0 if layer.shared else layer.numel * layer.itemsize
        return LayerSize(layer.name, layer.kind, 8 * layer.itemsize, 0, activations, weight + floats)
    folded = bool(layer.batch_norm) and plan.output is None
    if folded:
        floats = layer.out_channels * WORD  # the bias, that takes the shift
    codes = 0 if layer.shared else code_bytes(layer.numel, plan.weight)
    scales = 0 if layer.shared else weight_scale_bytes(layer, plan.weight, folded)
    return LayerSize(layer.name, layer.kind, plan.weight.mean_bits, codes, scales + activations, floats)


def code_bytes(numel: int, plan: TensorPlan) -> int:
    """Return the bytes of the codes of ``numel`` weights; those of an N:M sparse weight come with their positions."""
    pattern = plan.pattern
    if plan.channel_bits is not None:
        length, widths = numel // len(plan.channel_bits), plan.channel_bits
        return sum(math.ceil(widths.count(b) * length * b / 8) for b in set(widths))
    if pattern is None:
        return math.ceil(numel * plan.bits / 8)
    kept = pattern.count(numel)
    return math.ceil(kept * plan.bits / 8) + math.ceil(kept * pattern.position_bits / 8)


def stored_bits(plan: TensorPlan) -> float:
    """Return the bits that one weight takes in the packed file, without scales: N (bits + log2 M) / M where N:M sparse.

    Not to be mixed up with ``arithmetic_bits``: 2:4 at one bit is 1.5 bits stored, and 0.5 of a bit computed with.
    """
    pattern = plan.pattern
    return plan.mean_bits if pattern is None else (plan.bits + pattern.position_bits) * pattern.kept / pattern.of


def arithmetic_bits(plan: TensorPlan) -> float:
    """Return the bits of one weight as a multiplication sees them: bits * N / M where N:M sparse."""
    pattern = plan.pattern
    return plan.mean_bits if pattern is None else plan.bits * pattern.kept / pattern.of


def weight_scale_bytes(layer: LayerShape, plan: TensorPlan, folded: bool = False) -> int:
    """Return the bytes of a weight's scales and zero points or offsets; folding makes one per channel of one."""
    granularity = "channel" if folded and plan.granularity == "tensor" else plan.granularity
    grouping = Grouping(granularity, layer.channel_axis, layer.contraction_axis, plan.block)
    scale = max(WORD, layer.itemsize)  # float64 weights have float64 scales
    offset = plan.quantizer in QUANTIZERS and QUANTIZERS[plan.quantizer].has_offset
    shift = 0 if plan.symmetric else scale if offset else WORD
    return grouping.count(layer.weight_shape) * (scale + shift)


def activation_bytes(plan: TensorPlan | None, channels: int = 1) -> int:
    """Return the bytes that the quantizer of an activation stores: none if its range comes from each tensor anew."""
    if plan is None or (plan.quantizer in QUANTIZERS and QUANTIZERS[plan.quantizer].dynamic):
        return 0
    groups = 1 if plan.granularity == "tensor" else channels
    return groups * (WORD if plan.symmetric else 2 * WORD)


def operand_bytes(plan: TensorPlan | None, heads: int, operands: Sequence[str]) -> int:
    """Return the bytes of an attention's operand quantizers; that of the probabilities is always affine."""
    if plan is None or not heads:
        return 0
    affine = replace(plan, symmetric=False)
    return sum(activation_bytes(affine if name == "probability" else plan, heads) for name in operands)


def average_weight_bits(decided: Mapping[str, LayerPlan | None], shape: ModelShape) -> float:
    """Return the mean bits of a weight over all quantizable weights; those in float count with their full width."""
    own = [layer for layer in shape.layers if not layer.shared]
    bits = sum(layer.numel * weight_bits(layer, decided.get(layer.name)) for layer in own)
    return bits / max(shape.numel, 1)


def weight_bits(layer: LayerShape, plan: LayerPlan | None) -> float:
    """Return the bits of one weight of a layer as they are stored."""
    return 8 * layer.itemsize if plan is None or plan.weight is None else stored_bits(plan.weight)
