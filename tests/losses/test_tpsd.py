"""TPSD against the paper's loop over texts, and what it must not see: turns of the whole space, lengths, padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import TrainingError
from fewbits.losses import Joint, tpsd

TEXTS, REGIONS, WIDTH = 5, 12, 16
LABELS = torch.tensor(
    [[0, 0, 3, -1, 3, 3, 0, -1, 1, 3, 3, -1], [-1] * 12, [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 2, 2], [-1] * 11 + [2]]
)


def joint(seed: int, width: int = WIDTH) -> Joint:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(len(LABELS), REGIONS, width, generator=generator)
    return Joint(embeddings, F.normalize(torch.randn(TEXTS, width, generator=generator), dim=-1))


def turn(seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)))[0]


def loop(student: Joint, teacher: Joint, beta: float = 1.0) -> float:
    """The loss as section 3 of the paper writes it: by image and text, in double precision."""
    images = []
    for b, labels in enumerate(LABELS):
        texts = []
        for c in labels[labels >= 0].unique().tolist():
            grams = []
            for model in (student, teacher):
                rows = torch.cat([model.texts[c][None], model.embeddings[b][labels == c]]).double()
                rows = rows / rows.norm(dim=1, keepdim=True)
                grams.append(rows @ rows.T)
            texts.append(F.smooth_l1_loss(*grams, beta=beta, reduction="sum") / len(grams[0]) ** 2)
        if texts:
            images.append(torch.stack(texts).mean())
    return float(torch.stack(images).mean())


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_it_is_the_loop_over_texts(beta: float) -> None:
    student, teacher = joint(0), joint(1)
    assert float(tpsd(student, teacher, LABELS, beta=beta)) == pytest.approx(loop(student, teacher, beta), abs=1e-7)


def test_texts_of_each_image_and_other_widths_of_the_teacher() -> None:
    student, teacher = joint(0), joint(1, width=9)
    each = Joint(student.embeddings, student.texts.expand(len(LABELS), -1, -1))
    assert float(tpsd(each, teacher, LABELS)) == pytest.approx(loop(student, teacher), abs=1e-7)


def test_full_is_the_sum_of_its_two_parts() -> None:
    student, teacher = joint(0), joint(1)
    full, text, region = (
        float(tpsd(student, teacher, LABELS, variant=v)) for v in ("full", "region-text", "region-region")
    )
    assert text > 0.005 and region > 0.005 and full == pytest.approx(text + region, abs=1e-7)


def test_turning_regions_and_texts_together_costs_nothing_and_regions_alone_only_the_anchor() -> None:
    teacher, q = joint(0), turn(2)
    assert float(tpsd(teacher, teacher, LABELS)) == 0.0
    together = Joint(teacher.embeddings @ q, teacher.texts @ q)
    assert float(tpsd(together, teacher, LABELS)) < 1e-10
    alone = Joint(teacher.embeddings @ q, teacher.texts)
    assert float(tpsd(alone, teacher, LABELS)) > 0.01
    assert float(tpsd(alone, teacher, LABELS, variant="region-region")) < 1e-10


def test_lengths_do_not_matter() -> None:
    student, teacher = joint(0), joint(1)
    longer = Joint(student.embeddings * torch.rand(len(LABELS), REGIONS, 1).add(0.1), student.texts * 7)
    assert float(tpsd(longer, teacher, LABELS)) == pytest.approx(float(tpsd(student, teacher, LABELS)), abs=1e-6)


def test_images_without_positives_add_nothing_not_even_to_the_mean() -> None:
    student, teacher, keep = joint(0), joint(1), [0, 2, 3]
    fewer = [Joint(m.embeddings[keep], m.texts) for m in (student, teacher)]
    assert torch.equal(tpsd(*fewer, LABELS[keep]), tpsd(student, teacher, LABELS))
    nothing = tpsd(student, teacher, torch.full_like(LABELS, -1))
    assert float(nothing) == 0.0
    none = Joint(student.embeddings[:, :0], student.texts)
    assert float(tpsd(none, none, LABELS[:, :0])) == 0.0


def test_only_positives_of_the_student_get_gradients() -> None:
    student, teacher = joint(0), joint(1)
    tensors = [x.requires_grad_() for m in (student, teacher) for x in (m.embeddings, m.texts)]
    tpsd(student, teacher, LABELS).backward()
    regions, texts, *of_teacher = (x.grad for x in tensors)
    assert of_teacher == [None, None]
    assert texts is not None and regions is not None
    assert torch.equal(regions.abs().sum(-1) > 0, LABELS >= 0)


def test_it_is_computed_in_float32_under_autocast() -> None:
    student, teacher = joint(0), joint(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tpsd(student, teacher, LABELS)
    assert torch.equal(loss, tpsd(student, teacher, LABELS))


def test_what_does_not_fit_is_told() -> None:
    student, teacher = joint(0), joint(1)
    with pytest.raises(TrainingError, match="variant must be one of .*got 'text'"):
        tpsd(student, teacher, LABELS, variant="text")
    with pytest.raises(TrainingError, match="beta of smooth L1 must be above 0, got 0"):
        tpsd(student, teacher, LABELS, beta=0)
    with pytest.raises(TrainingError, match=r"texts \[5, 16\], the teacher .* and \[4, 16\]: only widths"):
        tpsd(student, Joint(teacher.embeddings, teacher.texts[:4]), LABELS)
    with pytest.raises(TrainingError, match=r"labels must be integers \[4, 12\].*float32"):
        tpsd(student, teacher, LABELS.float())
    with pytest.raises(TrainingError, match="label 5 has no text: there are 5"):
        tpsd(student, teacher, LABELS + 1)
