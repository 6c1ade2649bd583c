"""Losses beside the labels, one a file."""

from fewbits.losses.ada import AttentionAlignment
from fewbits.losses.fairness import GroupFairness
from fewbits.losses.taps import Taps, check_teacher

__all__ = ["AttentionAlignment", "GroupFairness", "Taps", "check_teacher"]
