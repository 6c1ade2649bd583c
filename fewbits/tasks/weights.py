"""Reading float weights from a user's checkpoint file."""

from __future__ import annotations

import fnmatch
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import CheckpointError, nearest

SHOWN = 5


def load_weights(model: nn.Module, path: str | Path, skip: Sequence[str] = ()) -> None:
    """Load a state dict, .safetensors or torch.save's format (no code in it is run), into ``model``.

    A ``state_dict`` level and the ``module.`` prefix of DataParallel are taken off. skip: glob patterns
    of tensors that keep the model's own values. Raises CheckpointError for a file that cannot be read,
    tensors missing, unknown or of another shape, and a pattern that matches no tensor of the file.
    """
    state = _read_state(Path(path))
    for pattern in skip:
        matched = fnmatch.filter(state, pattern)
        if not matched:
            raise CheckpointError(
                f"no tensor of {str(path)!r} matches the pattern {pattern!r}{nearest(pattern, state)}"
            )
        state = {name: tensor for name, tensor in state.items() if name not in matched}
    differences = _differences(model.state_dict(), state, skip)
    if differences:
        more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise CheckpointError(f"{str(path)!r} does not fit the model: {'; '.join(differences[:SHOWN])}{more}")
    model.load_state_dict(state, strict=False)


def load_cifar_resnet_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint of github akamaster/pytorch_resnet_cifar10 into a ``CifarResNet``."""
    load_weights(model, path)


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                return load_file(path)
            except SafetensorError as error:
                raise ValueError(error) from error
        data: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"cannot read the weights {str(path)!r}: {error}") from error
    state = data.get("state_dict", data) if isinstance(data, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{str(path)!r} holds no state dict of tensors; save model.state_dict()")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _differences(own: dict[str, Tensor], given: dict[str, Tensor], skip: Sequence[str]) -> list[str]:
    # Files from before PyTorch 0.4.1 lack num_batches_tracked; nothing is computed from it at inference.
    expected = {n for n in own if not n.endswith("num_batches_tracked")}
    skipped = {n for pattern in skip for n in fnmatch.filter(own, pattern)}
    missing = [f"{n} is missing" for n in sorted(expected - given.keys() - skipped)]
    unknown = [f"{n} is unknown to the model" for n in sorted(given.keys() - own.keys())]
    shapes = [
        f"{n} is {list(given[n].shape)} in the file and {list(own[n].shape)} in the model"
        for n in sorted(given.keys() & own.keys())
        if given[n].shape != own[n].shape
    ]
    return shapes + missing + unknown
