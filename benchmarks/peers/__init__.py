"""The same job done by fewbits and by its peers: one function per arm, all with the same placement.

Every arm fake-quantizes the weight (symmetric, a scale per output channel) and the input (a scale per tensor) of
each ``Conv2d`` and ``Linear``, at the same widths, calibrated on the same batches. What an arm cannot do is in
``Prepared.left_in_float`` with the library's own words; nothing is skipped silently.

Install the peers with ``pip install -r benchmarks/requirements.txt``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from .brevitas_arm import brevitas_arm
from .fewbits_arm import fewbits_arm
from .sites import Arm, PeerUnavailableError, Prepared, Widths, find_sites
from .torch_arms import torch_ao_arm, torch_ao_fx_arm, torchao_arm

__all__ = ["ARMS", "PeerUnavailableError", "Prepared", "Widths", "prepare"]


def _float_arm(model: nn.Module, widths: Widths, batches: Sequence[Tensor]) -> Prepared:
    return Prepared(model, [], {s.name: "the reference" for s in find_sites(model, widths, batches)})


ARMS: dict[str, Arm] = {
    "float": _float_arm,
    "fewbits-lsq": partial(fewbits_arm, quantizer="lsq"),
    "fewbits-ste": partial(fewbits_arm, quantizer="ste"),
    "fewbits-denoise": partial(fewbits_arm, quantizer="denoise", act_quantizer="denoise"),
    "fewbits-denoise-mean": partial(fewbits_arm, quantizer="mean", act_quantizer="denoise"),
    "fewbits-denoise-mask": partial(fewbits_arm, quantizer="masked", act_quantizer="masked"),
    "fewbits-denoise-weights": partial(fewbits_arm, quantizer="denoise"),
    "fewbits-ste-denoise-inputs": partial(fewbits_arm, quantizer="ste", act_quantizer="denoise"),
    "fewbits-ste-dynamic": partial(fewbits_arm, quantizer="ste", act_quantizer="dynamic"),
    "brevitas": partial(brevitas_arm, learned=False),
    "brevitas-learned": partial(brevitas_arm, learned=True),
    "torch.ao": torch_ao_arm,
    "torch.ao-fx": torch_ao_fx_arm,
    "torchao": torchao_arm,
}


def prepare(arm: str, model: nn.Module, widths: Widths, batches: Sequence[Tensor]) -> Prepared:
    """Quantize ``model`` (changed in place) for training with one of :data:`ARMS`, calibrated on ``batches``.

    Raises:
        PeerUnavailableError: the library is not installed, or it cannot quantize any layer of this model.
        KeyError: ``arm`` is unknown.
    """
    return ARMS[arm](model, widths, batches)
