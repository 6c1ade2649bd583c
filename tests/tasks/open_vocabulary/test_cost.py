"""The numbers of the paper (arXiv 2603.05964) follow from the model itself and the plan of the policy."""

from __future__ import annotations

import copy

import pytest
import torch

from fewbits.errors import DataError
from fewbits.layers import quantize
from fewbits.tasks.open_vocabulary.cost import detector_cost, shaped_detector
from fewbits.tasks.open_vocabulary.detector import OpenVocabularyDetector
from fewbits.tasks.open_vocabulary.policy import policy_4_4_8
from tests.tasks.open_vocabulary.made import vocabulary

COUNTS = {  # parameters, quantized weights, quantized output channels
    "m": (29_065_294, 28_715_520, 20_096),
    "l": (47_553_954, 47_091_712, 27_008),
    "x": (73_690_201, 73_113_856, 33_248),
}
SIZES = {"m": (110.88, 15.11), "l": (181.4, 24.32), "x": (281.11, 37.19)}  # of the paper: FP32 and 4-4-8, MiB
BOPS = {  # FP32 and 4-4-8, 1e12
    ("m", 80): (44.560, 2.049), ("l", 80): (90.602, 3.092), ("x", 80): (140.658, 4.207),
    ("m", 1203): (51.821, 7.104), ("l", 1203): (98.395, 8.177), ("x", 1203): (149.083, 9.325),
}  # fmt: skip
PUBLISHED = {  # the paper's own, of two digits
    ("m", 80): (44.56, 2.05), ("l", 80): (90.60, 3.09), ("x", 80): (140.66, 4.21),
    ("m", 1203): (51.82, 7.10), ("l", 1203): (98.39, 8.18), ("x", 1203): (149.08, 9.32),
}  # fmt: skip


@pytest.mark.parametrize(("size", "texts"), list(BOPS))
def test_sizes_and_bit_operations_are_those_of_the_paper(size: str, texts: int) -> None:
    model = shaped_detector(size, texts)
    found = detector_cost(model, policy_4_4_8(model))
    assert (found.parameters, found.quantized_weights, found.quantized_channels) == COUNTS[size]
    assert (found.float_mib, found.mib) == pytest.approx(SIZES[size], abs=0.01)
    assert (found.float_tbops, found.tbops) == pytest.approx(BOPS[size, texts], abs=0.0006)
    assert (found.float_tbops, found.tbops) == pytest.approx(PUBLISHED[size, texts], abs=0.01)


def test_parameters_of_the_modules_and_macs_by_kind_of_l() -> None:
    model = shaped_detector("l")
    backbone = sum(p.numel() for p in model.backbone.parameters())
    assert (round(backbone / 1e6, 2), round((47_553_954 - backbone) / 1e6, 2)) == (19.81, 27.75)
    found = detector_cost(model, policy_4_4_8(model)).macs
    assert {kind: round(macs / 1e9, 3) for kind, macs in found.items()} == {
        "quantized": 86.682, "float": 1.312, "region_text": 0.344, "attention": 0.140,
    }  # fmt: skip


def test_the_mean_parameters_of_s() -> None:
    assert sum(p.numel() for p in shaped_detector("s").parameters()) == 13_383_480


def test_a_detector_costs_the_same_on_its_weights_and_less_with_a_fixed_vocabulary() -> None:
    model = OpenVocabularyDetector("nano", vocabulary("cat", "red dog"))
    plan = policy_4_4_8(model)
    found = detector_cost(model, plan, 64, 96)
    assert found == detector_cost(shaped_detector("nano", 2, text_width=32), plan, 64, 96)
    points = 8 * 12 + 4 * 6 + 2 * 3
    assert found.macs["region_text"] == 2 * 32 * points
    assert found == detector_cost(quantize(copy.deepcopy(model), plan, verbose=False), plan, 64, 96)
    fixed = detector_cost(model.reparameterize(model.vocabulary), plan, 64, 96)
    assert fixed.parameters < found.parameters and fixed.macs["quantized"] < found.macs["quantized"]
    assert fixed.macs["attention"] == found.macs["attention"]


def test_costs_of_no_text() -> None:
    with pytest.raises(DataError, match="at least one text, got 0"):
        shaped_detector("l", 0)


def test_other_bits() -> None:
    model = shaped_detector("l", 80)
    base, five = (detector_cost(model, policy_4_4_8(model, act=act)) for act in (4, 5))
    assert five.mib == base.mib and five.tbops - base.tbops == pytest.approx(4 * base.macs["quantized"] / 1e12)
    eight = detector_cost(model, policy_4_4_8(model, weight=8))
    assert eight.mib - base.mib == pytest.approx(base.quantized_weights / 2 / 2**20)
    assert torch.device("meta") == model.texts.device
