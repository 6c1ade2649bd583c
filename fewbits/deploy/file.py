"""The packed file: safetensors with one byte tensor a module, and a manifest that says what the bytes mean.

Each module's state (codes, scales, bias, input range, batch norm, ...) lies in one uint8 tensor under the module's
name, floats first; so the header stays small beside one-bit codes. The manifest (versioned JSON, compressed, in the
metadata under "fewbits") lists the sections, the layers' plans and a SHA-256 of all of it. Nothing is pickled.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.deploy.fold import replace_norm
from fewbits.deploy.packed import PackedLayer, PackedWeight, packed_class
from fewbits.errors import PackedFileError, PlanError
from fewbits.layers import QuantizedLayer, float_class, quantized_layers, twin_class
from fewbits.plan import LayerPlan, layer_plan, tensor_plan
from fewbits.quantizers import Quantizer, make_quantizer

FILE_VERSION = 1
MANIFEST_LIMIT = 1 << 26  # bytes of decompressed manifest that we are willing to read


def save(packed: nn.Module, path: str | Path, about: Mapping[str, Any] | None = None) -> int:
    """Write a packed model as safetensors; return the bytes of the file. Raises PackedFileError if it cannot.

    about: what else the file tells, as JSON has it: how to build the model, say. ``read`` returns it with the manifest.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    layers = quantized_layers(packed)
    if not any(isinstance(layer, PackedLayer) for layer in layers.values()):
        raise PackedFileError("this model is not packed: call fewbits.pack(model) before save")
    blobs, sections, aliases, extra = _collect(packed.state_dict(), layers)
    manifest = {
        "version": FILE_VERSION,
        "sections": sections,
        "aliases": aliases,
        "extra": extra,
        "layers": {name: [m.float_class.__name__, m.layer_plan.to_dict()] for name, m in layers.items()},
        "folded": {norm: [layer, _output_plan(packed, norm)] for norm, layer in _folded(packed).items()},
        **({"about": dict(about)} if about else {}),
    }
    text = base64.b64encode(zlib.compress(json.dumps(manifest, separators=(",", ":")).encode(), 9)).decode()
    metadata = {"fewbits": text, "sha256": _digest(text, blobs)}
    partial = Path(f"{path}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as other new files; safetensors would let only the owner read it
        save_file(blobs, partial, metadata=metadata)
        partial.chmod(mode)
        partial.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise PackedFileError(f"cannot write {str(path)!r}: {error}") from error
    return Path(path).stat().st_size


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Fill a float model of the right architecture from a packed file, in place; return it packed, in eval mode.

    Codes are memory-mapped. Raises PackedFileError for a file that is missing, truncated, altered, of another
    version, or of another architecture (it lists the tensors that differ); the model is then not to be used.
    """
    blobs, manifest = read(path)
    state = _state(path, blobs, manifest)
    _check_architecture(path, model, manifest, state)
    modules = dict(model.named_modules())
    shared: dict[str, PackedWeight] = {}
    for name, (_, plan) in manifest["layers"].items():
        _become_packed(path, name, modules[name], layer_plan(plan), manifest["aliases"], shared, state)
    for norm, (layer, output) in manifest["folded"].items():
        replace_norm(model, norm, None if output is None else make_quantizer(tensor_plan(output)))
        modules[layer].bias = nn.Parameter(torch.empty_like(state[f"{layer}.bias"]), requires_grad=False)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise PackedFileError(f"{path}: the file does not fit this architecture: {error}") from error
    model.folded = {norm: layer for norm, (layer, _) in manifest["folded"].items()}  # type: ignore[assignment]
    return model.eval().requires_grad_(False)


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (bytes by module name, manifest) of a packed file, verified against its checksum."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            blobs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise PackedFileError(f"cannot read {str(path)!r}: {error}; is it complete, and a packed file?") from error
    if "fewbits" not in metadata or "sha256" not in metadata:
        raise PackedFileError(f"{path} is a safetensors file, but not one that fewbits packed")
    if _digest(metadata["fewbits"], blobs) != metadata["sha256"]:
        raise PackedFileError(f"{path} is damaged: its content does not match its checksum; copy or pack it again")
    return blobs, _manifest(path, metadata["fewbits"])


def _manifest(path: str | Path, text: str) -> dict[str, Any]:
    try:
        inflate = zlib.decompressobj()
        raw = inflate.decompress(base64.b64decode(text, validate=True), MANIFEST_LIMIT)
        if inflate.unconsumed_tail:
            raise PackedFileError(f"{path}: the manifest is larger than {MANIFEST_LIMIT} bytes: refused")
        manifest = json.loads(raw)
    except (ValueError, zlib.error, RecursionError) as error:
        raise PackedFileError(f"{path}: the manifest is not readable: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("version") != FILE_VERSION:
        found = manifest.get("version") if isinstance(manifest, dict) else None
        raise PackedFileError(
            f"{path} has format version {found}, this fewbits reads {FILE_VERSION}: update fewbits or pack again"
        )
    manifest.setdefault("about", {})
    for key in ("sections", "aliases", "extra", "layers", "folded", "about"):
        if not isinstance(manifest.get(key), dict):
            raise PackedFileError(f"{path}: the manifest lacks {key!r}")
    return manifest


def _collect(
    state: Mapping[str, Any], layers: Mapping[str, QuantizedLayer]
) -> tuple[dict[str, Tensor], dict[str, list[Any]], dict[str, str], dict[str, Any]]:
    """Group a state dict by module: (bytes, sections [key, dtype, shape], aliases, what is no tensor)."""
    groups: dict[str, list[tuple[str, Tensor]]] = {}
    aliases: dict[str, str] = {}
    extra: dict[str, Any] = {}
    seen: dict[Any, str] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            extra[key] = value
            continue
        value = value.detach().cpu().contiguous()
        identity = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.dtype)
        if value.numel() and identity in seen:
            aliases[key] = seen[identity]
            continue
        seen[identity] = key
        groups.setdefault(_owner(key, layers), []).append((key, value))
    blobs, sections = {}, {}
    for owner, members in groups.items():
        members.sort(key=lambda item: -item[1].element_size())  # keeps every section aligned
        blobs[owner] = torch.cat([v.reshape(-1).view(torch.uint8) for _, v in members])
        sections[owner] = [[k, str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in members]
    return blobs, sections, aliases, extra


def _folded(packed: Any) -> dict[str, str]:
    """Return {batch norm: layer} of what ``pack`` folded."""
    folded: dict[str, str] = packed.folded
    return folded


def _output_plan(packed: nn.Module, norm: str) -> dict[str, Any] | None:
    """Return the plan of the quantizer that a folded batch norm left behind."""
    left = packed.get_submodule(norm)
    return left.plan.to_dict() if isinstance(left, Quantizer) else None


def _owner(key: str, layers: Mapping[str, QuantizedLayer]) -> str:
    """Return the quantized layer a key belongs to, else the module that holds it."""
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:end]) in layers:
            return ".".join(parts[:end])
    return ".".join(parts[:-1]) or "."


def _state(path: str | Path, blobs: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Cut the bytes into tensors; no size from the manifest is believed before it is held against the bytes."""
    state: dict[str, Any] = dict(manifest["extra"])
    for owner, members in manifest["sections"].items():
        blob, start = blobs.get(owner), 0
        if blob is None:
            raise PackedFileError(f"{path}: the manifest names module {owner!r}, the file has no tensor for it")
        for key, dtype_name, shape in members:
            dtype = getattr(torch, str(dtype_name), None)
            if not isinstance(dtype, torch.dtype) or any(not isinstance(n, int) or n < 0 for n in shape):
                raise PackedFileError(f"{path}: tensor {key!r} has dtype {dtype_name!r} and shape {shape}")
            size = math.prod(shape) * dtype.itemsize
            if size > blob.numel() - start:
                raise PackedFileError(
                    f"{path}: tensor {key!r} claims {size} bytes, module {owner!r} has {blob.numel() - start} left"
                )
            piece = blob[start : start + size]
            aligned = piece if dtype == torch.uint8 else piece.clone()
            state[key] = aligned.view(dtype).reshape(shape)
            start += size
    for alias, key in manifest["aliases"].items():
        state[alias] = state[key]
    return state


def _check_architecture(
    path: str | Path, model: nn.Module, manifest: Mapping[str, Any], state: Mapping[str, Any]
) -> None:
    """Compare layers and tensor shapes with the float model before anything is changed."""
    modules = dict(model.named_modules())
    wrong = []
    for name, (kind, _) in manifest["layers"].items():
        if name not in modules:
            wrong.append(f"{name}: {kind} in the file, missing in the model")
            continue
        found = float_class(modules[name])
        twin = twin_class(found)
        if twin is None or found.__name__ != kind:
            wrong.append(f"{name}: {kind} in the file, {found.__name__} in the model")
            continue
        packed = manifest["extra"].get(f"{name}.packed._extra_state")
        weight = getattr(modules[name], twin.weight_name, None)
        if packed and weight is not None and list(weight.shape) != packed["shape"]:
            wrong.append(f"{name}.{twin.weight_name}: {packed['shape']} in the file, {list(weight.shape)} in the model")
    for key, value in model.state_dict().items():
        if isinstance(value, Tensor) and key in state and value.shape != state[key].shape:
            wrong.append(f"{key}: {list(state[key].shape)} in the file, {list(value.shape)} in the model")
    if wrong:
        shown = "\n  ".join(wrong[:12] + ([f"... and {len(wrong) - 12} more"] if len(wrong) > 12 else []))
        raise PackedFileError(f"{path} holds another architecture; build the model it was packed from:\n  {shown}")


def _become_packed(
    path: str | Path,
    name: str,
    layer: nn.Module,
    plan: LayerPlan,
    aliases: Mapping[str, str],
    shared: dict[str, PackedWeight],
    state: Mapping[str, Any],
) -> None:
    """Give a float layer the class and the quantizers of the packed one; its tensors come with the state."""
    cls = packed_class(float_class(layer)) if plan.weight is not None else twin_class(float_class(layer))
    assert cls is not None
    layer.__class__ = cls
    try:
        layer.attach(dataclasses.replace(plan), None)  # type: ignore[operator]
    except PlanError as error:
        raise PackedFileError(f"{path}: layer {name!r}: {error}") from error
    if f"{name}.bias" in state and getattr(layer, "bias", state) is None:  # a folded fusion has given it one
        layer.bias = nn.Parameter(torch.empty_like(state[f"{name}.bias"]), requires_grad=False)
    if plan.weight is not None:
        layer._parameters.pop(cls.weight_name, None)
        first = aliases.get(f"{name}.packed.codes", f"{name}.packed.codes")
        layer.packed = shared.setdefault(first, PackedWeight())


def _digest(text: str, blobs: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(blobs):
        digest.update(name.encode())
        digest.update(blobs[name].contiguous().numpy().data)
    return digest.hexdigest()
