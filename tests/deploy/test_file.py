import base64
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import fewbits as fb
from fewbits import LayerPlan, Plan, TensorPlan
from fewbits.deploy.file import _digest, read
from fewbits.errors import FewbitsError, PackedFileError
from tests.deploy.models import Residual, plan_for, quantized, randomize


@pytest.fixture
def packed_file(tmp_path: Path) -> tuple[Path, nn.Module, torch.Tensor]:
    x = torch.randn(2, 3, 12, 12)
    output = LayerPlan(output=TensorPlan(8, "ste", symmetric=False))
    packed = fb.pack(quantized(randomize(Residual()), plan_for(3, 4).override(("bn2", output)), [x]), x)
    path = tmp_path / "model.safetensors"
    assert fb.save(packed, path) == path.stat().st_size
    return path, packed, x


def rewrite(path: Path, change: Any) -> None:
    """Change the manifest and write the file anew with a fitting checksum."""
    with safe_open(path, framework="pt") as file:
        blobs = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        manifest = json.loads(zlib.decompress(base64.b64decode(file.metadata()["fewbits"])))
    change(manifest)
    text = base64.b64encode(zlib.compress(json.dumps(manifest).encode())).decode()
    save_file(blobs, path, metadata={"fewbits": text, "sha256": _digest(text, blobs)})


def test_load_gives_the_same_answers(packed_file: tuple[Path, nn.Module, torch.Tensor]) -> None:
    path, packed, x = packed_file
    loaded = fb.load(path, Residual())
    assert torch.equal(loaded(x), packed(x))
    assert loaded.folded == packed.folded
    assert not loaded.training


def test_unfolded_and_weight_only_models_load_too(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 12, 12)
    for number, example in enumerate((None, x)):
        packed = fb.pack(
            quantized(randomize(Residual()), plan_for(2, None, granularity="block", block=3), [x]), example
        )
        fb.save(packed, tmp_path / f"{number}.safetensors")
        assert torch.equal(fb.load(tmp_path / f"{number}.safetensors", Residual())(x), packed(x))


def linear(**weight: Any) -> nn.Module:
    """Return a quantized linear layer of 64 x 128 weights."""
    return fb.quantize(nn.Sequential(nn.Linear(128, 64, bias=False)), plan_for(1, None, **weight), verbose=False)


@pytest.mark.parametrize("kind", [{"quantizer": "denoise", "symmetric": False}, {"sparsity": "2:4"}])
def test_offsets_and_positions_survive_the_file(tmp_path: Path, kind: dict[str, Any]) -> None:
    packed: Any = fb.pack(linear(granularity="block", block=64, **kind))
    fb.save(packed, tmp_path / "m.safetensors")
    loaded: Any = fb.load(tmp_path / "m.safetensors", nn.Sequential(nn.Linear(128, 64, bias=False)))
    x = torch.randn(3, 128)
    assert torch.equal(loaded(x), packed(x))
    assert torch.equal(loaded[0].packed.get().values, packed[0].packed.get().values)


def test_a_sparse_file_is_as_small_as_its_index_coding(tmp_path: Path) -> None:
    dense = fb.save(fb.pack(linear(quantizer="denoise")), tmp_path / "dense.safetensors")
    sparse = fb.save(fb.pack(linear(quantizer="denoise", sparsity="1:8")), tmp_path / "sparse.safetensors")
    assert dense - sparse == pytest.approx(64 * 128 * (1 - 0.5) / 8, abs=100)  # half a bit a weight


def test_a_sparse_weight_without_positions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    fb.save(fb.pack(linear(sparsity="2:4")), path)

    def drop(manifest: dict[str, Any]) -> None:
        sections = manifest["sections"]["0"]
        manifest["sections"]["0"] = [s for s in sections if not s[0].endswith("positions")]

    rewrite(path, drop)
    model = nn.Sequential(nn.Linear(128, 64, bias=False))
    with pytest.raises(PackedFileError, match=r"2:4 sparse weight of shape .* has no positions|the stream has"):
        fb.load(path, model)(torch.randn(1, 128))


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(512, 64), nn.Linear(64, 512, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x))

    packed = fb.pack(fb.quantize(Tied(), plan_for(4, None), verbose=False))
    size = fb.save(packed, tmp_path / "tied.safetensors")
    assert size < 512 * 64 // 2 + 512 * 4 + 2000
    loaded = fb.load(tmp_path / "tied.safetensors", Tied())
    assert loaded.embed.packed is loaded.head.packed
    assert torch.equal(loaded(torch.arange(9)), packed(torch.arange(9)))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_file_is_little_more_than_its_codes(tmp_path: Path, bits: int) -> None:
    model = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Conv2d(64, 128, 3))
    packed = fb.pack(fb.quantize(model, plan_for(bits, None), verbose=False))
    codes = sum(p.numel() for n, p in model.named_parameters() if n.endswith(".weight")) * bits / 8
    ideal = codes + 4 * (64 + 128) * 2
    assert ideal <= fb.save(packed, tmp_path / "m.safetensors") < 1.1 * ideal


def test_every_truncation_is_an_error(packed_file: tuple[Path, nn.Module, torch.Tensor]) -> None:
    path, _, _ = packed_file
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(PackedFileError, match=r"model\.safetensors"):
            fb.load(path, Residual())


def test_every_flipped_bit_is_an_error(packed_file: tuple[Path, nn.Module, torch.Tensor]) -> None:
    path, _, _ = packed_file
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(0, len(whole), (60,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(bytes(damaged))
        with pytest.raises(FewbitsError, match=r"model\.safetensors"):
            fb.load(path, Residual())


def test_a_file_tells_what_it_was_given_to_tell(packed_file: tuple[Path, nn.Module, torch.Tensor]) -> None:
    path, packed, x = packed_file
    assert read(path)[1]["about"] == {}
    about = {"kind": "test", "side": [3, 4], "words": "ä, b"}
    fb.save(packed, path, about)
    assert read(path)[1]["about"] == about and torch.equal(fb.load(path, Residual())(x), packed(x))
    rewrite(path, lambda manifest: manifest.update(about=[1]))
    with pytest.raises(PackedFileError, match="the manifest lacks 'about'"):
        read(path)


def test_another_version_is_refused(packed_file: tuple[Path, nn.Module, torch.Tensor]) -> None:
    path, _, _ = packed_file
    rewrite(path, lambda manifest: manifest.update(version=99))
    with pytest.raises(PackedFileError, match="format version 99, this fewbits reads 1"):
        fb.load(path, Residual())


def test_sizes_that_would_over_allocate_are_refused(packed_file: tuple[Path, nn.Module, torch.Tensor]) -> None:
    path, _, _ = packed_file

    def inflate(manifest: dict[str, Any]) -> None:
        manifest["sections"]["conv1"][0][2] = [1 << 40]

    rewrite(path, inflate)
    with pytest.raises(PackedFileError, match="claims .* bytes, module 'conv1' has"):
        fb.load(path, Residual())


def test_a_packed_weight_larger_than_its_codes_is_refused(packed_file: tuple[Path, nn.Module, torch.Tensor]) -> None:
    path, _, x = packed_file

    def widen(manifest: dict[str, Any]) -> None:
        manifest["extra"]["conv1.packed._extra_state"]["grid"][0] = 8

    rewrite(path, widen)
    with pytest.raises(PackedFileError, match="the stream has"):
        fb.load(path, Residual())(x)


def test_another_architecture_lists_what_differs(packed_file: tuple[Path, nn.Module, torch.Tensor]) -> None:
    path, _, _ = packed_file
    other = Residual()
    other.fc = nn.Linear(8, 7)
    with pytest.raises(PackedFileError, match=r"fc\.weight: \[5, 8\] in the file, \[7, 8\] in the model"):
        fb.load(path, other)
    with pytest.raises(PackedFileError, match="conv1: Conv2d in the file, missing in the model"):
        fb.load(path, nn.Sequential(nn.Linear(2, 2)))


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(PackedFileError, match="not one that fewbits packed"):
        read(tmp_path / "foreign.safetensors")
    with pytest.raises(PackedFileError, match=r"missing\.safetensors"):
        read(tmp_path / "missing.safetensors")
    with pytest.raises(PackedFileError, match=r"call fewbits\.pack"):
        fb.save(Residual(), tmp_path / "m.safetensors")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 12, 12)
    packed = fb.pack(quantized(Residual(), plan_for(4), [x]))
    with pytest.raises(PackedFileError, match="cannot write"):
        fb.save(packed, tmp_path / "no" / "such" / "folder.safetensors")


def test_plans_survive_the_file(packed_file: tuple[Path, nn.Module, torch.Tensor]) -> None:
    path, packed, _ = packed_file
    loaded = fb.load(path, Residual())
    assert loaded.conv1.layer_plan == packed.conv1.layer_plan
    assert Plan((("conv1", loaded.conv1.layer_plan),)) == Plan((("conv1", packed.conv1.layer_plan),))
