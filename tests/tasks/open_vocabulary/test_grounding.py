"""Grounding DINO and MM-Grounding-DINO of the library: answers, loss, policy and distillation."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor, nn

from fewbits.errors import DataError
from fewbits.layers import quantized_layers
from fewbits.losses import pkd
from fewbits.tasks.open_vocabulary.grounding import GroundingDino, phrase_tokens
from fewbits.tasks.open_vocabulary.queries import query_distillation
from tests.tasks.open_vocabulary.library import PROMPT, grounding, images, quantize_in_haste, stages_of

FAMILIES = ("GroundingDino", "MMGroundingDino")
TARGETS = torch.tensor(
    [[[0.0, 4.0, 4.0, 40.0, 30.0], [2.0, 20.0, 30.0, 60.0, 60.0]], [[1.0, 8.0, 0.0, 30.0, 60.0], [-1.0, 0, 0, 0, 0]]]
)


def test_phrases_are_told_apart_as_by_the_library() -> None:
    module = importlib.import_module("transformers.models.grounding_dino.modeling_grounding_dino")
    ids = torch.tensor([[101, 7, 8, 1012, 9, 1012, 5, 6, 4, 1029, 102, 0, 0]])
    (expected,) = module.build_label_maps(torch.zeros(1, 1, 16), ids)
    assert torch.equal(phrase_tokens(ids[0]), expected[:, :13].bool()) and len(expected) == 3
    bare = phrase_tokens(torch.tensor([7, 8, 1012, 9, 1012]))  # no [CLS] before the first phrase
    assert bare.int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 1, 0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_tokens_and_of_regions_and_texts(family: str) -> None:
    detector, x = grounding(family), images()
    with torch.no_grad():
        found = detector.predict(x)
        expected = detector.model(x, PROMPT.expand(2, -1), attention_mask=torch.ones(2, 9, dtype=torch.int64))
    by_token = expected.logits
    torch.testing.assert_close(found.logits[..., 0], by_token[..., 1])
    torch.testing.assert_close(found.logits[..., 1], by_token[..., 3:5].mean(-1))
    product = found.embeddings @ found.texts.mT
    if family == "MMGroundingDino":
        product = product / 32**0.5 + detector.model.class_embed[-1].bias
    torch.testing.assert_close(found.logits, product, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.boxes[..., 2] - found.boxes[..., 0], 64 * expected.pred_boxes[..., 2])
    torch.testing.assert_close(found.features, detector.backbone_features(x))
    torch.testing.assert_close(found.layers[0][1], corners_of(expected.init_reference_points))


def corners_of(boxes: Tensor) -> Tensor:
    x, y, w, h = (64 * boxes).unbind(-1)
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_but_the_texts_is_trained(family: str) -> None:
    detector, x = grounding(family).train(), images()
    loss, found = detector.loss(x, TARGETS)
    teacher = grounding(family)
    with torch.no_grad():
        theirs = teacher.predict(x)
    assert torch.equal(query_distillation(theirs, theirs, TARGETS), torch.zeros(()))
    total = loss + query_distillation(found, theirs, TARGETS) + pkd(found.features, theirs.features)
    total.backward()
    missed = [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert {n.rpartition(".")[0] for n in missed} <= {"model.model.backbone.conv_encoder.model.swin.layernorm"}
    assert not any(p.requires_grad for p in detector.model.model.text_backbone.parameters())
    assert not any(m.training for m in detector.model.model.text_backbone.modules()), "it would drop out"
    assert detector.model.model.encoder.training
    curriculum = stages_of(detector)
    curriculum.check(detector)
    assert curriculum.place("model.model.level_embed") == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_in_float32_under_autocast(family: str) -> None:
    detector = grounding(family).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = detector.loss(images(), TARGETS)
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_a_batch_without_objects_has_a_loss() -> None:
    detector = grounding("MMGroundingDino").train()
    loss, _ = detector.loss(images(), TARGETS[:, :0])
    loss.backward()
    assert loss.isfinite()


@pytest.fixture(scope="module")
def quantized() -> GroundingDino:
    torch.manual_seed(0)
    detector = grounding("GroundingDino")
    quantize_in_haste(detector, images())
    return detector


def test_the_policy_leaves_texts_and_ends_in_float(quantized: GroundingDino) -> None:
    plans = {name: layer.layer_plan for name, layer in quantized_layers(quantized).items()}
    for name, module in quantized.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            end = ("bbox_embed" in name and name.endswith("layers.2")) or name.endswith("patch_embeddings.projection")
            assert (name in plans) != (end or "text_backbone" in name or "text_projection" in name), name
    kinds = [type(layer).__name__ for name, layer in quantized_layers(quantized).items() if plans[name].operands]
    counts = {kind: kinds.count(f"QuantizedGroundingDino{kind}Attention") for kind in ("Multihead", "BiMultiHead")}
    assert counts == {"Multihead": 5, "BiMultiHead": 1}
    assert kinds.count("QuantizedGroundingDinoMultiscaleDeformableAttention") == 3


def test_a_quantized_one_learns(quantized: GroundingDino) -> None:
    detector, x = copy.deepcopy(quantized).train(), images()
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], 2e-3)
    losses = []
    for _ in range(3):
        loss, _ = detector.loss(x, TARGETS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_prompts_that_do_not_fit_are_told() -> None:
    model = grounding("GroundingDino").model
    with pytest.raises(DataError, match=r"one prompt for all images, \[1, L\], got \[2, 9\]"):
        GroundingDino(model, PROMPT.expand(2, -1))
    with pytest.raises(DataError, match=r"\[101, 1012, 102\] has no phrase"):
        GroundingDino(model, torch.tensor([[101, 1012, 102]]))
