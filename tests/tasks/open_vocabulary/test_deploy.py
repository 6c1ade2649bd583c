"""A quantized open-vocabulary detector is packed, saved, loaded and run by ONNX Runtime with the answers it trained."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fewbits.cost import model_shape, size
from fewbits.deploy.file import load, save
from fewbits.deploy.onnx_export import export_onnx
from fewbits.deploy.pack import code_mismatches, pack
from fewbits.deploy.verify import open_session
from fewbits.layers import calibrate, quantize
from fewbits.plan import LayerPlan, Plan, TensorPlan
from fewbits.tasks.open_vocabulary.attention import Baked, ImagePoolingAttention, MaxSigmoidAttention
from fewbits.tasks.open_vocabulary.blocks import TextCSP, conv
from fewbits.tasks.open_vocabulary.detector import Head, OpenVocabularyDetector
from fewbits.tasks.open_vocabulary.policy import policy_4_4_8
from tests.tasks.open_vocabulary.made import TINY, tiny_detector, vocabulary

PROMPTS = ("cat", "a dog", "red car", "blue bus")


def trained(reparameterize: bool = False) -> tuple[OpenVocabularyDetector, Tensor]:
    """Return a detector after one step at 4-4-8, and images."""
    model, images = tiny_detector(*PROMPTS), torch.randn(2, 3, 64, 64)
    quantize(model, policy_4_4_8(model), verbose=False)
    calibrate(model, [images])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    model(images).square().mean().backward()
    optimizer.step()
    return (model.eval().reparameterize(model.vocabulary) if reparameterize else model.eval()), images


def test_packed_it_answers_as_trained_for_any_vocabulary() -> None:
    model, images = trained()
    packed = pack(model)
    assert torch.equal(packed(images), model(images)) and code_mismatches(model, packed) == 0
    other = vocabulary("kite", "old bus")
    packed.set_vocabulary(other)
    model.set_vocabulary(other)
    assert torch.equal(packed(images), model(images)) and packed(images).shape[-1] == 6
    folded = pack(model, images)
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(norms) - set(folded.folded) == {"backbone.stem.1"}, "the stem stays in float"
    apart = (folded(images) - model(images)).abs()
    assert apart.median() < 0.02 and apart.max() < 1  # pixels: a code at a border may fall to either side


def test_a_file_holds_what_size_says_and_is_read_back_for_any_vocabulary(tmp_path: Path) -> None:
    model, images = trained()
    packed = pack(model, images)
    save(packed, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert size(policy_4_4_8(model), model_shape(tiny_detector(*PROMPTS), images)).total == stored
    again = load(tmp_path / "m.safetensors", tiny_detector("another"))
    again.set_vocabulary(model.vocabulary)
    assert torch.equal(again(images), packed(images))


def test_a_fixed_vocabulary_is_part_of_the_file(tmp_path: Path) -> None:
    model, images = trained()
    fixed = copy.deepcopy(model).reparameterize(model.vocabulary)
    assert torch.equal(fixed(images), model(images))
    packed = pack(fixed, images)
    save(packed, tmp_path / "m.safetensors")
    fresh = vocabulary("one", "two", "three", "four")
    again = load(tmp_path / "m.safetensors", tiny_detector().reparameterize(fresh))
    assert torch.equal(again(images), packed(images))


class Slice(nn.Module):
    """One of each kind of block of a detector: to export a whole one takes ten seconds."""

    texts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("texts", vocabulary(*PROMPTS).embeddings)
        self.stem, self.gate = conv(3, 16, 3, 2), MaxSigmoidAttention(16, 32, 4)
        self.enhance = ImagePoolingAttention((16,), 32, 16, 8)
        self.block, self.out = TextCSP(16, 16, 0, 32, 4), nn.Conv2d(16, 32, 1)
        self.compare = Head(16, TINY, 32, 8).compare

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, points, T]."""
        x = self.stem(images)
        x = x + self.gate(x, self.texts)
        y = self.out(self.block(x, self.enhance((x,), self.texts)))
        return self.compare(y.flatten(2).mT, self.texts)


def test_onnx_runtime_answers_the_same(tmp_path: Path) -> None:
    model, images = Slice().eval(), torch.randn(2, 3, 16, 8)
    few = TensorPlan(4, symmetric=False)
    layer = LayerPlan(TensorPlan(4, granularity="channel"), few, TensorPlan(8, symmetric=False, granularity="head"))
    quantize(model, Plan((("*", layer),)), verbose=False)
    calibrate(model, [images])
    with torch.no_grad():  # as ``reparameterize`` does
        model.gate.guide = Baked(model.gate.guide(model.texts))
    packed = pack(model, images)
    export_onnx(packed, tmp_path / "m.onnx", images)
    run = open_session(tmp_path / "m.onnx")
    for count in (1, 2):  # the batch stays free
        apart = (torch.from_numpy(run([images[:count]])) - packed(images[:count])).abs()
        assert apart.median() < 1e-4 and apart.max() < 1  # a code at a border may fall to either side
