"""Distillation at the teacher's positives, and the measures of how far a student is from its teacher."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fewbits.errors import DataError, TrainingError
from fewbits.losses import Joint, tpsd
from fewbits.tasks.open_vocabulary.assign import positives
from fewbits.tasks.open_vocabulary.regions import Regions
from fewbits.tasks.open_vocabulary.relations import Relation, distillation, drift, relations
from tests.tasks.open_vocabulary.answers import TARGETS, answer


def moved(found: Regions, by: float) -> Regions:
    embeddings = found.embeddings + by * torch.randn(found.embeddings.shape)
    return found._replace(embeddings=embeddings, logits=3 * F.normalize(embeddings, dim=-1) @ found.texts.T)


def test_it_is_distilled_where_the_teacher_finds_the_objects() -> None:
    student, teacher = answer(0), answer(1)
    student = student._replace(embeddings=student.embeddings.clone().requires_grad_())
    loss = distillation(student, teacher, TARGETS)
    loss.backward()
    labels = positives(teacher, TARGETS)
    assert not torch.equal(labels, positives(student, TARGETS)), "else this test could not tell the two"
    assert torch.equal(student.embeddings.grad.abs().sum(-1) > 0, labels >= 0)  # type: ignore[union-attr]
    joints = [Joint(m.embeddings.detach(), m.texts) for m in (student, teacher)]
    assert torch.equal(loss.detach(), tpsd(*joints, labels))
    parts = [distillation(student, teacher, TARGETS, variant=v) for v in ("region-text", "region-region")]
    assert torch.allclose(sum(parts), loss, atol=1e-7)  # type: ignore[arg-type]
    assert distillation(teacher, teacher, TARGETS) == 0


def test_relations_are_the_similarities_of_each_category_with_enough_positives() -> None:
    student, teacher = answer(0), answer(1)
    found = relations(student, teacher, TARGETS, least=3)
    labels = positives(teacher, TARGETS)
    counts = {(b, c): int((labels[b] == c).sum()) for b in range(3) for c in range(5)}
    assert {(r.image, r.label) for r in found} == {key for key, n in counts.items() if n >= 3}
    one = found[0]
    pair = student.embeddings[one.image, one.points[[0, 2]]]
    assert float(one.student[1, 3]) == pytest.approx(float(F.cosine_similarity(*pair, dim=0)), abs=1e-6)
    own = F.cosine_similarity(teacher.texts[one.label], teacher.embeddings[one.image, one.points[1]], dim=0)
    assert float(one.teacher[0, 2]) == pytest.approx(float(own), abs=1e-6)
    assert torch.equal(one.student_scores, student.logits[one.image, one.points].sigmoid())


def test_measures_of_one_relation_by_hand() -> None:
    mine, theirs = torch.eye(4), torch.eye(4)
    for matrix, values in ((mine, (0.1, 0.5, 0.3)), (theirs, (0.2, 0.3, 0.9))):
        for (i, j), value in zip(((1, 2), (1, 3), (2, 3)), values):
            matrix[i, j] = matrix[j, i] = value
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    one = Relation(0, 1, torch.arange(3), mine, theirs, scores, torch.ones(3, 2))
    assert one.error == pytest.approx((0.1 + 0.2 + 0.6) / 3)
    assert one.score_error == pytest.approx((1 + 2 * (1 - 0.5**0.5)) / 3, abs=1e-6)
    r = torch.corrcoef(torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.3, 0.9]]))[0, 1]
    assert one.correlation == pytest.approx(float(r), abs=1e-6)
    got = drift([one])
    assert (got.count, got.confidence, got.teacher_confidence) == (1, pytest.approx(2 / 3), 1.0)


def test_drift_grows_with_what_was_moved_and_is_zero_at_the_teacher() -> None:
    teacher = answer(1)
    found = [drift(relations(moved(teacher, by), teacher, TARGETS, 3)) for by in (0.0, 0.1, 1.0)]
    assert found[0].embedding_error == found[0].score_error == 0 and found[0].correlation == pytest.approx(1)
    errors = [d.embedding_error for d in found]
    assert errors == sorted(errors) and errors[2] > 5 * errors[1]
    assert found[1].correlation > 0.95 > found[2].correlation


def test_agreement_is_the_rank_correlation_of_the_two_errors() -> None:
    from scipy.stats import spearmanr

    teacher = answer(1)
    found = [r for by in (0.1, 0.3, 0.5, 1.0) for r in relations(moved(teacher, by), teacher, TARGETS, 3)]
    found += found[:2]  # equal ranks
    expected = spearmanr([r.error for r in found], [r.score_error for r in found]).statistic
    assert drift(found).agreement == pytest.approx(float(expected), abs=1e-9)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(TrainingError, match=r"student answers \[3, 84, 5\].*teacher \[3, 84, 4\]"):
        distillation(answer(0), answer(0, texts=4), TARGETS)
    with pytest.raises(TrainingError, match="at least 2 regions, got least=1"):
        relations(answer(0), answer(1), TARGETS, 1)
    with pytest.raises(DataError, match="no category has enough positives"):
        drift([])
