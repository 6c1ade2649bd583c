"""OWL-ViT and OWLv2 of the library: patches as queries, paired by index."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fewbits.errors import DataError
from fewbits.layers import quantize, quantized_layers
from fewbits.losses import pkd
from fewbits.tasks.open_vocabulary.adapters import library_policy
from fewbits.tasks.open_vocabulary.owl import OwlDetector
from fewbits.tasks.open_vocabulary.queries import query_distillation
from tests.tasks.open_vocabulary.library import images, omdet, owl, quantize_in_haste, stages_of, token_ids

FAMILIES = ("OwlViT", "Owlv2")
TARGETS = torch.tensor([[[0.0, 4, 4, 40, 30], [2, 20, 30, 60, 60]], [[1, 8, 0, 30, 60], [-1.0, 0, 0, 0, 0]]])


@pytest.mark.parametrize("family", FAMILIES)
def test_it_answers_as_the_library_does(family: str) -> None:
    detector, x = owl(family), images()
    with torch.no_grad():
        found = detector.predict(x)
        expected = detector.model(input_ids=token_ids().repeat(2, 1), pixel_values=x)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close((found.boxes[..., 2] - found.boxes[..., 0]) / 64, expected.pred_boxes[..., 2])
    torch.testing.assert_close(found.embeddings, expected.class_embeds)
    assert torch.equal(found.features[0], detector.backbone_features(x)[0]) and found.features[0].shape == (2, 32, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_one_learns_from_labels_and_teacher(family: str) -> None:
    teacher, x = owl(family), images()
    student = copy.deepcopy(teacher)
    quantize_in_haste(student, x)
    student.train()
    with torch.no_grad():
        theirs = teacher.predict(x)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(4):
        loss, found = student.loss(x, TARGETS)
        apart = query_distillation(found, theirs, TARGETS, pairing=student.pairing)
        total = loss + 6 * apart + 6 * pkd(found.features, theirs.features)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
        assert apart.item() > 1e-6
    assert losses[-1] < losses[0]
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for n, p in student.named_parameters() if n in trained)
    assert not any(part in n for n in trained for part in ("text_", "objectness", "visual_projection"))


def test_the_policy_leaves_texts_and_ends_in_float() -> None:
    detector = owl("Owlv2")
    quantize(detector, library_policy(detector, 3, 5, 7), verbose=False)
    stages_of(detector).check(detector)
    layers = quantized_layers(detector)
    heads = {name for name in layers if "_head" in name}
    assert heads == {"model.box_head.dense0", "model.box_head.dense1"}
    blocks = [name for name in layers if ".vision_model.encoder.layers.0." in name]
    assert len(blocks) == 7 and len(layers) == 2 + 2 * 7
    linear = detector.get_submodule("model.owlv2.vision_model.encoder.layers.0.self_attn.q_proj").layer_plan
    assert isinstance(detector.model.class_head.dense0, nn.Linear)
    operands = detector.get_submodule("model.owlv2.vision_model.encoder.layers.0.self_attn").layer_plan.operands
    assert (linear.weight.bits, linear.input.bits, operands.bits) == (3, 5, 7)  # type: ignore[union-attr]


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(DataError, match="need an OwlViTForObjectDetection or Owlv2.*got a OmDetTurbo"):
        OwlDetector(omdet().model, token_ids(), token_ids())
    with pytest.raises(DataError, match=r"texts \[T, L\] with their mask, got \[3, 5\], \[3, 4\]"):
        OwlDetector(owl("Owlv2").model, token_ids(), token_ids()[:, 1:])
