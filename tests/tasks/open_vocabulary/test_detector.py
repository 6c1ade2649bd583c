from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import DataError, RecipeError
from fewbits.tasks.open_vocabulary import attention as attention_module
from fewbits.tasks.open_vocabulary.attention import MaxSigmoidAttention, pooled
from fewbits.tasks.open_vocabulary.detector import OpenVocabularyDetector, boxes_of
from fewbits.tasks.open_vocabulary.sizes import SIZES
from tests.tasks.open_vocabulary.made import tiny_detector, vocabulary


def test_what_a_detector_says_of_a_batch() -> None:
    model, images = tiny_detector(), torch.randn(2, 3, 64, 96)
    found = model.predict(images)
    points = 8 * 12 + 4 * 6 + 2 * 3
    assert found.embeddings.shape == (2, points, 32) and found.texts.shape == (3, 32)
    assert found.logits.shape == (2, points, 3) and found.sides.shape == (2, points, 4, 16)
    assert found.boxes.shape == (2, points, 4) and found.points.shape == (points, 2) and len(found.strides) == points
    assert [tuple(f.shape) for f in found.features] == [(2, 16, 8, 12), (2, 32, 4, 6), (2, 32, 2, 3)]
    out = model(images)
    assert torch.equal(out, torch.cat([found.boxes, found.logits.sigmoid()], 2))
    torch.testing.assert_close(found.texts.norm(dim=1), torch.ones(3))
    inside = (found.points > 0).all(1) & (found.points < torch.tensor([96.0, 64.0])).all(1)
    assert inside.all() and (found.boxes[..., 2:] > found.boxes[..., :2]).all()


def test_logits_are_scaled_cosines_of_regions_and_texts() -> None:
    model = tiny_detector()
    found = model.predict(torch.randn(1, 3, 64, 64))
    cosine = F.normalize(found.embeddings, dim=-1) @ found.texts.T
    for stride, head in zip((8.0, 16.0, 32.0), model.heads):
        level = found.strides == stride
        shift = torch.tensor(5 / 80 / (640 / stride) ** 2).log()
        assert head.shift.item() == pytest.approx(float(shift)) and head.log_scale.exp().item() == pytest.approx(
            1 / 0.07
        )
        torch.testing.assert_close(found.logits[:, level], cosine[:, level] / 0.07 + shift, atol=1e-4, rtol=1e-4)


def test_boxes_are_the_mean_of_the_distributions_of_their_sides() -> None:
    sides = torch.full((1, 1, 4, 16), -100.0)
    for side, distance in enumerate((1, 2, 3, 0)):
        sides[0, 0, side, distance] = 100.0
    sides[0, 0, 3, 1] = 100.0  # half of 0 and half of 1
    assert boxes_of(sides, torch.tensor([[40.0, 50.0]]), torch.tensor([8.0])).tolist() == [[[32.0, 34.0, 64.0, 54.0]]]


def test_nano_is_about_a_million_parameters_and_learns() -> None:
    model = OpenVocabularyDetector("nano", vocabulary("cat", "dog"))
    assert 1.0e6 < sum(p.numel() for p in model.parameters()) < 1.5e6
    out = model(torch.randn(1, 3, 64, 64))
    out.square().mean().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not idle


def test_children_are_the_modules_of_a_curriculum() -> None:
    model = tiny_detector()
    assert [name for name, _ in model.named_children()] == ["backbone", "neck", "heads"]
    assert list(SIZES) == ["nano", "s", "m", "l", "x"]


def test_the_neck_sees_the_texts_and_the_enhancer_the_image() -> None:
    model, images = tiny_detector("cat", "dog"), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MaxSigmoidAttention):
                module.guide.weight.mul_(8)  # else one text more hardly moves the maximum
    other = vocabulary("cat", "dog", "red car").embeddings
    first, second = model.predict(images), model.predict(images, other)
    assert second.logits.shape[-1] == 3 and not torch.equal(first.embeddings, second.embeddings)
    seen: list[Tensor] = []
    model.neck.enhance.register_forward_hook(lambda m, a, y: seen.append(y))
    model.predict(images)
    assert seen[0].shape == (2, 2, 32) and not torch.equal(seen[0][0], seen[0][1])


@pytest.mark.parametrize("size", [(3, 3), (4, 5), (20, 8), (1, 2)])
def test_pooling_is_adaptive_max_pooling(size: tuple[int, int]) -> None:
    x = torch.randn(2, 4, *size)
    assert torch.equal(pooled(x), nn.AdaptiveMaxPool2d(3)(x).flatten(2).mT)


def test_max_sigmoid_attention_by_its_formula() -> None:
    layer, x, texts = MaxSigmoidAttention(16, 12, 8).eval(), torch.randn(2, 16, 3, 4), torch.randn(5, 12)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.5, -2.0]))
    guide, y = layer.guide(texts), layer.norm(layer.project(x))
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        best = torch.einsum("bchw,tc->bthw", x[:, part], guide[:, part]).amax(1)
        gate = (best / 8**0.5 + layer.bias[head]).sigmoid()
        torch.testing.assert_close(layer(x, texts)[:, part], y[:, part] * gate[:, None])


def test_a_text_of_its_own_for_each_image() -> None:
    layer, x, texts = MaxSigmoidAttention(16, 12, 8).eval(), torch.randn(2, 16, 3, 4), torch.randn(2, 5, 12)
    alone = torch.cat([layer(x[i : i + 1], texts[i]) for i in range(2)])
    torch.testing.assert_close(layer(x, texts), alone)


def test_scores_of_texts_at_a_time_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, texts = MaxSigmoidAttention(16, 12, 8).eval(), torch.randn(2, 16, 3, 4), torch.randn(7, 12)
    whole = layer(x, texts)
    monkeypatch.setattr(attention_module, "TEXTS_AT_ONCE", 3)
    torch.testing.assert_close(layer(x, texts), whole)


def test_vocabularies_of_one_and_of_ten_thousand() -> None:
    model, images = tiny_detector(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        many = model.predict(images, F.normalize(torch.randn(10_000, 32), dim=1))
        one = model.predict(images, F.normalize(torch.randn(1, 32), dim=1))
    assert many.logits.shape == (1, 84, 10_000) and one.logits.shape == (1, 84, 1)
    assert torch.isfinite(many.logits).all()
    model.set_vocabulary(vocabulary(*(f"thing {i}" for i in range(700))))
    with torch.no_grad():
        assert model(images).shape == (1, 84, 704)


def test_texts_that_do_not_fit() -> None:
    model, images = tiny_detector(), torch.randn(1, 3, 64, 64)
    for texts in (torch.empty(0, 32), torch.ones(2, 16), torch.ones(32)):
        with pytest.raises(DataError, match=r"texts must be \[T, 32\] with T of at least 1, got"):
            model.predict(images, texts)
    with pytest.raises(DataError, match="width 32"):
        model.set_vocabulary(vocabulary("cat", width=16))
    with pytest.raises(DataError, match=r"multiples of 32, got \[60, 64\]"):
        model.predict(torch.randn(1, 3, 60, 64))
    with pytest.raises(RecipeError, match="did you mean"):
        OpenVocabularyDetector("nan", vocabulary("cat"))


def test_reparameterizing_keeps_the_answers_and_fixes_the_texts() -> None:
    model, images = tiny_detector(), torch.randn(2, 3, 64, 64)
    fresh = vocabulary("bus", "big bus", "kite", "old bus")
    fixed = copy.deepcopy(model).reparameterize(fresh)
    model.set_vocabulary(fresh)
    assert torch.equal(fixed(images), model(images)) and not fixed.training
    gone = {name for name, _ in model.named_parameters()} - {name for name, _ in fixed.named_parameters()}
    assert {name.rsplit(".", 1)[0] for name in gone} == {
        "neck.top4.attention.guide", "neck.top3.attention.guide", "neck.enhance.query.0", "neck.enhance.query.1",
    }  # fmt: skip
    assert "texts" in fixed.state_dict() and "texts" not in model.state_dict()
    with pytest.raises(DataError, match="reparameterized for 4 texts"):
        fixed.set_vocabulary(fresh)
    with pytest.raises(DataError, match="no others"):
        fixed.predict(images, fresh.embeddings)


def test_weights_do_not_depend_on_the_vocabulary() -> None:
    first, second = tiny_detector("cat", "dog"), tiny_detector("kite")
    second.load_state_dict(first.state_dict())
    texts = vocabulary("bus", "car").embeddings
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(first.predict(images, texts).logits, second.predict(images, texts).logits)
