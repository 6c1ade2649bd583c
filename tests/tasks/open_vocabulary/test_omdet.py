"""OmDet-Turbo of the library: the wrapper answers as it does, trains, is quantized and distilled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fewbits.deploy import pack
from fewbits.errors import DataError
from fewbits.layers import quantized_layers
from fewbits.tasks.open_vocabulary.detr_loss import detr_loss
from fewbits.tasks.open_vocabulary.omdet import OmDetTurbo
from fewbits.tasks.open_vocabulary.queries import query_distillation
from tests.tasks.open_vocabulary.library import images, omdet, quantize_in_haste, stages_of, token_ids

TARGETS = torch.tensor(
    [[[0.0, 4.0, 4.0, 40.0, 30.0], [2.0, 20.0, 30.0, 60.0, 60.0]], [[1.0, 8.0, 0.0, 30.0, 60.0], [-1.0, 0, 0, 0, 0]]]
)


def test_it_answers_as_the_library_does() -> None:
    detector, x = omdet(), images()
    with torch.no_grad():
        found, out = detector.predict(x), detector(x)
        ones = torch.ones_like(token_ids())
        expected = detector.model(
            pixel_values=x,
            classes_input_ids=token_ids().repeat(2, 1),
            classes_attention_mask=ones.repeat(2, 1),
            tasks_input_ids=token_ids()[:1].repeat(2, 1),
            tasks_attention_mask=ones[:1].repeat(2, 1),
            classes_structure=torch.tensor([3, 3]),
        )
    torch.testing.assert_close(found.logits, expected.decoder_class_logits)
    x1, y1, x2, y2 = (found.boxes / 64).unbind(-1)
    boxes = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], -1)
    torch.testing.assert_close(boxes, expected.decoder_coord_logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out, torch.cat([found.boxes, found.logits.sigmoid()], -1))
    cosines = torch.cosine_similarity(found.embeddings[:, :, None], found.texts, dim=-1)
    torch.testing.assert_close(cosines / 0.07, found.logits, atol=1e-4, rtol=1e-4)
    assert [f.shape[-1] for f in found.features] == [8, 4, 2]


def test_its_modules_hold_every_trained_parameter() -> None:
    detector = omdet()
    parts = detector.functional_modules()
    assert list(parts) == ["backbone", "neck", "head"]
    inside = {id(p) for names in parts.values() for n in names for p in detector.get_submodule(n).parameters()}
    assert inside == {id(p) for p in detector.parameters() if p.requires_grad}
    stages_of(detector).check(detector)


@pytest.fixture(scope="module")
def quantized() -> OmDetTurbo:
    torch.manual_seed(0)
    detector = omdet()
    quantize_in_haste(detector, images())
    return detector


def test_the_policy_is_that_of_the_specification(quantized: OmDetTurbo) -> None:
    detector = quantized
    plans = {name: layer.layer_plan for name, layer in quantized_layers(detector).items()}
    swin = "model.vision_backbone.vision_backbone.swin"
    floats = {
        f"{swin}.embeddings.patch_embeddings.projection",
        "model.decoder.decoder_class_head.1",
        *(f"model.decoder.decoder_bbox_head.{i}.layers.2" for i in range(2)),
    }
    of_text = "model.language_backbone."
    for name, module in detector.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert (name in plans) != (name in floats or name.startswith(of_text)), name
    attention = {name: p.operands for name, p in plans.items() if p.operands is not None}
    kinds = [type(detector.get_submodule(name)).__name__ for name in attention]
    assert {(p.bits, p.granularity, p.symmetric) for p in attention.values()} == {(8, "head", False)}
    assert kinds.count("QuantizedSwinAttention") == 4 and kinds.count("QuantizedOmDetTurboMultiheadAttention") == 3
    assert kinds.count("QuantizedOmDetTurboMultiscaleDeformableAttention") == 2
    weights = [p for p in plans.values() if p.weight is not None]
    assert {(p.weight.bits, p.weight.granularity, p.weight.symmetric) for p in weights} == {(4, "channel", True)}  # type: ignore[union-attr]
    assert {(p.input.bits, p.input.granularity, p.input.symmetric) for p in weights} == {(4, "tensor", False)}  # type: ignore[union-attr]


def test_packed_it_answers_as_it_was_trained(quantized: OmDetTurbo) -> None:
    x = images()
    with torch.no_grad():
        expected, got = quantized(x), pack(quantized, x)(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_it_learns_in_low_bits_and_its_text_encoder_does_not(quantized: OmDetTurbo) -> None:
    detector, x = copy.deepcopy(quantized).train(), images()
    frozen = copy.deepcopy(detector.model.language_backbone.state_dict())
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], 4e-3)
    losses = []
    for _ in range(5):
        loss, found = detector.loss(x, TARGETS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(found.layers) == 3, "the proposals and two layers"
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(v, frozen[k]) for k, v in detector.model.language_backbone.state_dict().items())


def test_it_is_distilled_and_the_gradient_reaches_every_module() -> None:
    teacher, x = omdet().requires_grad_(False), images()
    student = copy.deepcopy(teacher).train()
    for name in ("vision_backbone", "encoder", "decoder"):
        student.model.get_submodule(name).requires_grad_(True)
    with torch.no_grad():
        for p in student.model.decoder.parameters():
            p += 0.05 * torch.randn_like(p)
        theirs = teacher.predict(x)
        assert float(query_distillation(teacher.predict(x), theirs, TARGETS)) == 0
    for pairing, mine in (("rank", student.predict(x)), ("shared", student.predict(x, theirs.proposals))):
        student.zero_grad()
        loss = query_distillation(mine, theirs, TARGETS, pairing=pairing)
        loss.backward()
        assert loss.item() > 1e-5
        # in training the library stops the gradient of proposals: the encoder is reached through the decoder's values
        for name in ("vision_backbone", "encoder", "decoder.layers.1", "decoder.decoder_class_head.1"):
            grads = [p.grad for p in student.model.get_submodule(name).parameters() if p.grad is not None]
            assert grads and any(g.any() for g in grads), (pairing, name)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_that_starts_from_the_teachers_proposals_is_paired_by_index() -> None:
    teacher, x = omdet(), images()
    other: Any = omdet()
    with torch.no_grad():
        theirs = teacher.predict(x)
        again = teacher.predict(x, theirs.proposals)
        mine = other.predict(x, theirs.proposals)
        assert detr_loss(again, TARGETS) < detr_loss(theirs, TARGETS), "given proposals are not the student's to answer"
    torch.testing.assert_close(again.boxes, theirs.boxes)
    torch.testing.assert_close(again.embeddings, theirs.embeddings)
    assert torch.equal(mine.proposals.references, theirs.proposals.references)
    assert not torch.allclose(mine.boxes, theirs.boxes)
    assert "_get_decoder_input" not in vars(other.model.decoder)


def test_texts_of_another_shape_are_told() -> None:
    with pytest.raises(DataError, match=r"ids of class names \[T, L\] and of one task .* got \[5\]"):
        OmDetTurbo(omdet().model, token_ids()[0], token_ids()[:1], torch.ones(1, 5))
