"""Verbs on a model by name, without data: what a plan costs, and which plan fits a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.allocate import Budget, allocate, uniform_plan
from fewbits.cost import (
    Hardware,
    LayerCost,
    MacArray,
    ModelShape,
    bops,
    hardware_cost,
    layer_bops,
    model_shape,
    plan_cycles,
    size,
)
from fewbits.errors import RecipeError
from fewbits.plan import Plan
from fewbits.recipes.images import find_weights
from fewbits.tasks.detector import SIZES, STRIDES, own_detector
from fewbits.tasks.language import LIBRARY, build_language_model, is_language_model
from fewbits.tasks.models import build_model
from fewbits.tasks.open_vocabulary.cost import SIDE, TEXTS, detector_cost, placeholder
from fewbits.tasks.open_vocabulary.detector import OpenVocabularyDetector
from fewbits.tasks.open_vocabulary.policy import parse_policy, policy_4_4_8
from fewbits.tasks.open_vocabulary.sizes import size_of
from fewbits.tasks.segmenters import build_segmenter, is_segmenter
from fewbits.tasks.weights import load_weights

LIBRARY_INPUT, LIBRARY_CLASSES = (3, 224, 224), 1000
INPUTS = {"reference_cnn": (1, 8, 8)}  # of our own models; the others read CIFAR's images
OWN_INPUT, OWN_CLASSES = (3, 32, 32), 10
SEGMENTER_INPUT, SEGMENTER_CLASSES = (3, 256, 256), 21  # the classes of Pascal VOC, as torchvision's models have them
DETECTOR_INPUT, DETECTOR_CLASSES = (3, 320, 320), 80  # COCO's classes
OPEN_DETECTOR, OPEN_DETECTOR_INPUT = "yolo-world:", (3, SIDE, SIDE)
WINDOW = 1024  # the most tokens of a language model's example


def named_model(
    name: str, classes: int | None = None, input_shape: Sequence[int] | None = None, weights: str | None = None
) -> tuple[nn.Module, Tensor]:
    """Build a model by name; return it and an example of one image [1, C, H, W], or of one window of tokens [1, T].

    classes: of a language model, its vocabulary. Raises RecipeError for an unknown name, a shape that the model does
    not read, or a weights file that is not there.
    """
    if is_language_model(name):
        return _language_model(name, classes, input_shape, weights)
    if is_segmenter(name):
        return _segmenter(name, classes, input_shape, weights)
    if name in SIZES:
        return _detector(name, classes, input_shape, weights)
    if is_open_detector(name):
        return _open_detector(name, classes, input_shape, weights)
    library = ":" in name
    shape = tuple(input_shape or (LIBRARY_INPUT if library else INPUTS.get(name, OWN_INPUT)))
    torch.manual_seed(0)
    path = _file(weights)
    count = classes or (LIBRARY_CLASSES if library else OWN_CLASSES)
    model = build_model(name, count, shape[0], pretrained_path=path)
    return model.eval(), torch.zeros(1, *shape)


def _segmenter(
    name: str, classes: int | None, input_shape: Sequence[int] | None, weights: str | None
) -> tuple[nn.Module, Tensor]:
    shape = tuple(input_shape or SEGMENTER_INPUT)
    if len(shape) != 3 or shape[0] != 3:
        raise RecipeError(f"{name!r} reads images of 3 channels: --input is 3, height and width, got {list(shape)}")
    torch.manual_seed(0)
    model = build_segmenter(name, classes or SEGMENTER_CLASSES, _file(weights))
    return model.eval(), torch.zeros(1, *shape)


def _detector(
    name: str, classes: int | None, input_shape: Sequence[int] | None, weights: str | None
) -> tuple[nn.Module, Tensor]:
    shape = _detector_input(name, input_shape or DETECTOR_INPUT)
    torch.manual_seed(0)
    model, path = own_detector(name, classes or DETECTOR_CLASSES), _file(weights)
    if path is not None:
        load_weights(model, path)
    return model.eval(), torch.zeros(1, *shape)


def _detector_input(name: str, input_shape: Sequence[int]) -> tuple[int, ...]:
    if len(input_shape) != 3 or input_shape[0] != 3 or any(side % STRIDES[-1] for side in input_shape[1:]):
        raise RecipeError(f"{name!r} reads 3 x H x W with sides in multiples of {STRIDES[-1]}, got {list(input_shape)}")
    return tuple(input_shape)


def is_open_detector(name: str) -> bool:
    """Tell whether this is ``yolo-world:SIZE``, a detector of any texts."""
    return name.startswith(OPEN_DETECTOR)


def _open_detector(
    name: str, texts: int | None, input_shape: Sequence[int] | None, weights: str | None, device: str = "cpu"
) -> tuple[OpenVocabularyDetector, Tensor]:
    """Build an open-vocabulary detector for so many texts, whose meaning does not matter; on "meta" without memory."""
    shape = _detector_input(name, input_shape or OPEN_DETECTOR_INPUT)
    size_of(name.removeprefix(OPEN_DETECTOR))
    vocabulary, path = placeholder(texts or TEXTS), _file(weights)
    torch.manual_seed(0)
    with torch.device(device):
        model, example = OpenVocabularyDetector(name.removeprefix(OPEN_DETECTOR), vocabulary), torch.zeros(1, *shape)
    if path is not None:
        load_weights(model, path)
    return model.eval(), example


def weighed_model(
    name: str,
    classes: int | None,
    input_shape: Sequence[int] | None,
    weights: str | None,
    hardware: str | None,
) -> tuple[nn.Module, Tensor]:
    """Build a model to take its costs, as ``named_model`` does; an open-vocabulary detector without memory for its
    weights, unless a file of them or hardware is named, that may look at them."""
    if is_open_detector(name) and weights is None and hardware is None:
        return _open_detector(name, classes, input_shape, None, "meta")
    return named_model(name, classes, input_shape, weights)


def _language_model(
    name: str, vocabulary: int | None, input_shape: Sequence[int] | None, weights: str | None
) -> tuple[nn.Module, Tensor]:
    """Build a language model; the context of our own is what is asked for, if anything is."""
    own = not name.startswith(LIBRARY)
    if input_shape is not None and len(input_shape) != 1:
        raise RecipeError(f"{name!r} reads tokens: --input is the length of a window, got {list(input_shape)}")
    if vocabulary is not None and not own:
        raise RecipeError(f"the vocabulary of {name!r} is fixed by its configuration; leave --classes out")
    torch.manual_seed(0)
    length = None if input_shape is None else input_shape[0]
    asked = {"vocabulary": vocabulary, "context": length} if own else {}
    model: Any = build_language_model(name, **{key: value for key, value in asked.items() if value is not None})
    path = _file(weights)
    if path is not None:
        load_weights(model, path)
    return model.eval(), torch.zeros(1, length or min(model.context or WINDOW, WINDOW), dtype=torch.int64)


def _file(weights: str | None) -> Path | None:
    path = None if weights is None else find_weights(weights)
    if weights is not None and path is None:
        raise RecipeError(f"the weights file {weights!r} does not exist; correct --weights")
    return path


def cost(model: nn.Module, example: Tensor, plan: Plan, hardware: str | Path | None = None) -> dict[str, Any]:
    """Return what a plan costs: layers, weights, bytes, bit operations of one input.

    hardware: a name or a file; its cycles, energy and latency then come along. Cycles that a description measures are
    those of the weights that the model holds. Of an open-vocabulary detector comes ``detector_cost``, too.
    """
    described = None if hardware is None else Hardware.load(hardware)
    shape = model_shape(model, example)
    weighed, decided = size(plan, shape), shape.resolve(plan)
    layers = [
        {
            "name": layer.name,
            "kind": layer.kind,
            "weights": 0 if layer.shared else layer.numel,
            "bits": row.bits,
            "bytes": row.codes + row.scales,
            "macs": layer.macs + layer.operand_macs,
            "bops": layer_bops(layer, decided.get(layer.name)),
        }
        for layer, row in zip(shape.layers, weighed.layers)
    ]
    answer: dict[str, Any] = {
        "layers": layers,
        "weights": shape.numel,
        "bytes": weighed.total,
        "float_bytes": 4 * shape.numel + shape.float_bytes,
        "average_weight_bits": weighed.average_weight_bits,
        "macs": sum(layer.macs + layer.operand_macs for layer in shape.layers),
        "bops": bops(plan, shape),
    }
    if isinstance(model, OpenVocabularyDetector):
        height, width = example.shape[-2:]
        answer["texts"] = len(model.vocabulary)
        answer["detector"] = asdict(detector_cost(model, plan, height, width))
    return answer if described is None else _on_hardware(answer, described, model, shape, plan)


def _on_hardware(
    answer: dict[str, Any], hardware: Hardware, model: nn.Module, shape: ModelShape, plan: Plan
) -> dict[str, Any]:
    """Return ``answer`` with what the plan costs on hardware, for each layer and in total."""
    found = hardware_cost(plan, shape, hardware, plan_cycles(model, plan) if hardware.measures_cycles else None)
    rows = [row | _layer_on_hardware(cost) for row, cost in zip(answer["layers"], found.layers)]
    return answer | {
        "layers": rows,
        "cycles": found.cycles,
        "energy_uj": {"compute": found.compute_energy, "memory": found.memory_energy},
        "latency_ms": found.latency,
        "hardware": {
            "name": hardware.name,
            "cycles_from": "the weights at hand" if hardware.measures_cycles else "the description",
            "float_inputs_fed_as_8_bits": _float_inputs_fed(hardware, shape, plan),
            "energy_ratio": found.energy_ratio,
            "latency_ratio": found.latency_ratio,
            "mac_area_um2": found.mac_area,
            "area_ratio": found.area_ratio,
            "notes": hardware.notes,
        },
    }


def _float_inputs_fed(hardware: Hardware, shape: ModelShape, plan: Plan) -> int:
    """Return the number of layers whose input the plan leaves in float and the hardware takes as 8 bits."""
    if not isinstance(hardware.engine, MacArray):
        return 0
    decided = shape.resolve(plan)
    found = (decided.get(layer.name) for layer in shape.layers if layer.macs)
    return sum(layer is None or layer.input is None for layer in found)


def _layer_on_hardware(cost: LayerCost) -> dict[str, Any]:
    return {
        "cycles": cost.cycles,
        "energy_uj": {"compute": cost.compute_energy, "memory": cost.memory_energy},
        "latency_ms": cost.latency,
        "bound": cost.bound,
    }


def plan_for(
    model: nn.Module,
    plan_file: Path | None,
    weight_bits: int,
    act_bits: int | None,
    first_last: int | None,
    policy: str | None = None,
) -> Plan:
    """Return the plan in a file, that of a policy W-A-Att of an open-vocabulary detector, or a uniform one."""
    if policy is not None:
        if plan_file is not None:
            raise RecipeError(f"the plan {str(plan_file)!r} and the policy {policy!r} are both given: drop one")
        return policy_4_4_8(model, *parse_policy(policy))
    if plan_file is not None:
        return Plan.load(plan_file)
    return uniform_plan(model, weight_bits, act_bits, first_last=first_last)


def allocated(model: nn.Module, example: Tensor, limits: dict[str, Any], **how: Any) -> Plan:
    """Return the plan for a budget. Raises BudgetError for one below what is possible, saying the least."""
    return allocate(model, Budget(**limits), example=example, **how)
