"""Which operation of an open-vocabulary detector gets how many bits: W-A-Att, as 4-4-8.

"Quantization-Aware Training with Multimodal Alignment" (arXiv 2603.05964); the placement is the one that gives the
paper's sizes and bit operations.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fewbits.errors import PlanError
from fewbits.layers import quantizable
from fewbits.plan import LayerPlan, Plan, TensorPlan
from fewbits.quantizers import quantizer_class

FLOAT_LAYERS = ("backbone.stem.0", "heads.*.class_out", "heads.*.box_out")  # the first and the last ones


def policy_4_4_8(
    model: nn.Module, weight: int = 4, act: int = 4, attention: int = 8, act_granularity: str = "tensor"
) -> Plan:
    """Return the plan of an ``OpenVocabularyDetector``.

    weight, act: bits of all convolutions and linear layers but the first and the last, which stay in float: weights
    symmetric with a learned step per output channel, inputs affine with learned step and zero point, per tensor (or
    per "channel"). attention: bits of the operands of both kinds of attention, affine, per head. The product of regions
    and texts is no layer and stays in float. Raises PlanError for a model of other layers.
    """
    names = list(quantizable(model))
    if FLOAT_LAYERS[0] not in names or not any(name.endswith(".class_out") for name in names):
        raise PlanError(
            f"the policy W-A-Att is for an OpenVocabularyDetector, got a {type(model).__name__} with layers "
            f"{names[:4]}: take fewbits.uniform_plan, or a plan of your own"
        )
    everywhere = w_a_att(weight, act, attention, act_granularity)
    return Plan((("*", everywhere), *((name, None) for name in FLOAT_LAYERS)), decided_from(weight, act, attention))


def w_a_att(weight: int, act: int, attention: int, act_granularity: str = "tensor") -> LayerPlan:
    """Return what a layer gets of it that has all: weights, an input and the operands of attention."""
    return LayerPlan(
        TensorPlan(weight, "lsq", granularity="channel", options=quantizer_class("lsq").weight_options(weight)),
        TensorPlan(act, "lsq+", symmetric=False, granularity=act_granularity),
        TensorPlan(attention, "lsq+", symmetric=False, granularity="head"),
    )


def decided_from(weight: int, act: int, attention: int) -> dict[str, Any]:
    """Return how a plan of a policy tells where it comes from."""
    return {"method": "policy", "bits": f"{weight}-{act}-{attention}"}


def parse_policy(text: str) -> tuple[int, int, int]:
    """Read bits of weights, activations and attention, such as "4-4-8". Raises PlanError for another form."""
    parts = text.split("-")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise PlanError(f"a policy is W-A-Att, bits of weights, activations and attention, such as 4-4-8; got {text!r}")
    weight, act, attention = (int(part) for part in parts)
    return weight, act, attention
