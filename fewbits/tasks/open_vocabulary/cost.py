"""What an open-vocabulary detector costs, counted as the paper on CR-QAT counts (arXiv 2603.05964, tables of size and
bit operations).

It differs from ``fewbits.cost`` in two ways: the size is that of parameters before batch norms are folded, without the
few scales of activations; and bit operations include the product of regions and texts, which is no layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewbits.cost import LayerShape, ModelShape, bops, model_shape
from fewbits.cost.bops import FLOAT_BITS
from fewbits.cost.size import WORD
from fewbits.errors import DataError
from fewbits.plan import LayerPlan, Plan
from fewbits.quantizers import Quantizer
from fewbits.tasks.detector import STRIDES
from fewbits.tasks.open_vocabulary.detector import OpenVocabularyDetector
from fewbits.tasks.open_vocabulary.text import ComposedText
from fewbits.tasks.open_vocabulary.vocabulary import Vocabulary

SIDE = 640  # pixels of YOLO-World's images
TEXTS = 80  # of COCO
MIB = 2**20


@dataclass(frozen=True)
class DetectorCost:
    """Sizes in MiB, bit operations in 1e12, the latter for one image.

    quantized_channels: each has a float32 scale. macs: multiply-accumulates by the kind of operation: "quantized" and
    "float" layers, "region_text" (in float) and "attention". float_*: of the same model without a plan.
    """

    parameters: int
    quantized_weights: int
    quantized_channels: int
    float_mib: float
    mib: float
    float_tbops: float
    tbops: float
    macs: dict[str, int]


def shaped_detector(size: str, texts: int = TEXTS, text_width: int = 512) -> OpenVocabularyDetector:
    """Return a detector without memory for its weights (on the device "meta"), for a vocabulary of ``texts`` texts."""
    vocabulary = placeholder(texts, text_width)
    with torch.device("meta"):
        return OpenVocabularyDetector(size, vocabulary).eval()


def placeholder(texts: int, text_width: int = 512) -> Vocabulary:
    """Return a vocabulary of so many texts where their meaning does not matter. Raises DataError for none."""
    if texts < 1:
        raise DataError(f"a vocabulary has at least one text, got {texts}")
    return Vocabulary.of(ComposedText(text_width), [f"text {i}" for i in range(texts)])


def detector_cost(model: OpenVocabularyDetector, plan: Plan, height: int = SIDE, width: int = SIDE) -> DetectorCost:
    """Return what a detector, quantized or not, costs under a plan with its vocabulary, for one image."""
    shape = model_shape(model, torch.zeros(1, 3, height, width, device=model.texts.device))
    decided = {name: found or LayerPlan() for name, found in shape.resolve(plan).items()}
    pairs = [(layer, decided.get(layer.name, LayerPlan())) for layer in shape.layers]
    quantized = [(layer, given.weight) for layer, given in pairs if given.weight is not None]
    region_text = model.texts.numel() * sum((height // s) * (width // s) for s in STRIDES)
    steps = {p for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()}  # counted by channel
    parameters = sum(p.numel() for p in model.parameters() if p not in steps)
    weights = sum(layer.numel for layer, _ in quantized)
    channels = sum(layer.out_channels for layer, _ in quantized)
    codes = sum(layer.numel * given.mean_bits / 8 for layer, given in quantized)
    outside = region_text * FLOAT_BITS**2
    return DetectorCost(
        parameters=parameters,
        quantized_weights=weights,
        quantized_channels=channels,
        float_mib=WORD * parameters / MIB,
        mib=(codes + WORD * (parameters - weights + channels)) / MIB,
        float_tbops=(bops(Plan(()), shape) + outside) / 1e12,
        tbops=(bops(plan, shape) + outside) / 1e12,
        macs=_macs(shape, [layer for layer, _ in quantized], region_text),
    )


def _macs(shape: ModelShape, quantized: list[LayerShape], region_text: int) -> dict[str, int]:
    few = sum(layer.macs for layer in quantized)
    return {
        "quantized": few,
        "float": sum(layer.macs for layer in shape.layers) - few,
        "region_text": region_text,
        "attention": sum(layer.operand_macs for layer in shape.layers),
    }
