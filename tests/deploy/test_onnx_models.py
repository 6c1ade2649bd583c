"""ONNX files of whole architectures answer as the packed models do; all of them: benchmarks/onnx_zoo.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fewbits as fb
from benchmarks.onnx_zoo import ARMS, parity, run
from fewbits import LayerPlan, Plan, TensorPlan
from fewbits.errors import ExportError
from tests.zoo import ZOO, Made

A8 = TensorPlan(8, "ste", symmetric=False)
W8A8 = Plan((("*", LayerPlan(TensorPlan(8, "ste", granularity="channel"), A8, A8)),))
SUBSET = ["torchvision:resnet18", "torchvision:mobilenet_v3_small", "a small ViT", "transformers:gpt2"]


def small_vit() -> Made:
    from torchvision.models import VisionTransformer

    size = {"image_size": 32, "patch_size": 8, "hidden_dim": 32, "mlp_dim": 64, "num_classes": 10}
    return VisionTransformer(num_layers=2, num_heads=2, **size), torch.randn(2, 3, 32, 32)


class Mixed(nn.Module):
    """Token indices [N, 5] through an embedding and an attention, and layers that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.auxiliary = nn.Linear(8, 3)

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        x = self.embed(tokens) * scale
        x = self.attend(x, x, x, need_weights=False)[0]
        return self.auxiliary(x) if self.training else x


def packed_mixed() -> tuple[nn.Module, dict[str, Tensor]]:
    batch = {"tokens": torch.randint(9, (3, 5)), "scale": torch.rand(3, 1, 1)}
    model = fb.quantize(Mixed(), W8A8, verbose=False)
    with pytest.warns(UserWarning, match=r"\['auxiliary'\]"):
        fb.calibrate(model, [batch])
    return fb.pack(model, batch), batch


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", SUBSET)
def test_an_architecture_answers_as_its_packed_model(name: str, arm: str, tmp_path: Path) -> None:
    if name in ZOO:
        pytest.importorskip(name.split(":")[0])
    found = parity(*ZOO.get(name, small_vit)(), *ARMS[arm], tmp_path)
    assert found.free_batch
    assert found.exact <= max(0.01, found.noise) < found.quantization, found


@pytest.mark.parametrize("mode", ["fastest", "smallest"])
def test_attention_embedding_keyword_inputs_and_an_unused_layer(mode: str, tmp_path: Path) -> None:
    packed, batch = packed_mixed()
    report = fb.export_onnx(packed, tmp_path / "m.onnx", batch, mode=mode)
    assert report.weight_types["embed"] == report.weight_types["attend"] == "INT8"
    for n in (1, 3):  # the first axis is free
        part = {name: t[:n] for name, t in batch.items()}
        got = run(tmp_path / "m.onnx", part, exact=True)[0]
        torch.testing.assert_close(got, packed(**part), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("head_first", "bits", "mode"), [(False, 8, "fastest"), (True, 8, "fastest"), (True, 2, "smallest")]
)
def test_a_head_that_shares_the_weight_of_an_embedding(head_first: bool, bits: int, mode: str, tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            embed, head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
            head.weight = embed.weight
            self.add_module("a", head if head_first else embed)
            self.add_module("b", embed if head_first else head)

        def forward(self, tokens: Tensor) -> Tensor:
            embed, head = (self.b, self.a) if head_first else (self.a, self.b)
            return head(embed(tokens).mean(1))

    tokens = torch.randint(9, (3, 5))
    plan = Plan((("*", LayerPlan(TensorPlan(bits, "ste", granularity="channel"), A8)),))
    packed = fb.pack(fb.calibrate(fb.quantize(Tied(), plan, verbose=False), [tokens]), tokens)
    report = fb.export_onnx(packed, tmp_path / "m.onnx", tokens, mode=mode)
    assert report.weight_types == {"a": f"INT{bits}"}  # one weight in the file
    torch.testing.assert_close(run(tmp_path / "m.onnx", tokens)[0], packed(tokens), rtol=0, atol=1e-6)


def test_a_layer_that_is_used_but_was_never_calibrated_is_named(tmp_path: Path) -> None:
    packed, batch = packed_mixed()
    packed.forward = lambda tokens, scale: packed.auxiliary(packed.embed(tokens) * scale)  # type: ignore[method-assign]
    with pytest.raises(ExportError, match="^input of layer 'auxiliary': this quantizer has no range yet"):
        fb.export_onnx(packed, tmp_path / "m.onnx", batch)
