"""Losses beside the labels, one a file."""

from fewbits.losses.ada import AttentionAlignment
from fewbits.losses.fairness import GroupFairness
from fewbits.losses.kd import binary_kd, logits_kd
from fewbits.losses.pkd import pkd
from fewbits.losses.taps import Taps, check_teacher
from fewbits.losses.tpsd import Joint, tpsd

__all__ = [
    "AttentionAlignment",
    "GroupFairness",
    "Joint",
    "Taps",
    "binary_kd",
    "check_teacher",
    "logits_kd",
    "pkd",
    "tpsd",
]
