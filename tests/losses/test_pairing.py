"""Pairs of queries: by rank, each query once, and nothing where a model found nothing."""

from __future__ import annotations

import pytest
import torch

from fewbits.errors import TrainingError
from fewbits.losses.pairing import best, rank_pairs, shared_pairs

STUDENT = torch.tensor([[[0.1, 0.9, 0.0, 0.5, 0.0], [0.0, 0.8, 0.7, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]])
TEACHER = torch.tensor([[[0.6, 0.0, 0.0, 0.2, 0.9], [0.4, 0.0, 0.0, 0.0, 0.3], [0.0, 0.2, 0.0, 0.0, 0.0]]])


def test_the_best_of_each_object_best_first_and_each_query_once() -> None:
    assert best(STUDENT, 3).tolist() == [[[1, 3, 0], [2, -1, -1], [-1, -1, -1]]]
    assert best(STUDENT, 1).tolist() == [[[1], [-1], [-1]]]
    assert best(TEACHER, 9).tolist() == [[[4, 0, 3, -1, -1], [-1] * 5, [1, -1, -1, -1, -1]]]


def test_ranks_are_paired_as_far_as_both_models_have_them() -> None:
    pairs = rank_pairs(STUDENT, TEACHER, 3)
    there = pairs.object[0] >= 0
    found = torch.stack([pairs.object, pairs.student, pairs.teacher])[:, 0, there].T.tolist()
    assert found == [
        [0, 1, 4],
        [0, 3, 0],
        [0, 0, 3],
    ]  # the second object is lost by the teacher, the third by the student
    assert pairs.labels(torch.tensor([[7, 5, -1]]))[0].tolist() == [7, 7, 7] + [-1] * 6
    values = torch.arange(10.0).reshape(1, 5, 2)
    assert pairs.of_student(values)[0, :3, 0].tolist() == [2.0, 6.0, 0.0]
    assert pairs.of_teacher(values)[0, :3, 1].tolist() == [9.0, 1.0, 7.0]


def test_ranks_of_models_with_other_numbers_of_queries() -> None:
    pairs = rank_pairs(STUDENT, TEACHER[..., 3:], 4)
    assert pairs.object[0, pairs.object[0] >= 0].tolist() == [0, 0]
    assert pairs.teacher[0, :2].tolist() == [1, 0]


def test_shared_queries_are_paired_with_themselves_by_the_teachers_choice() -> None:
    pairs = shared_pairs(TEACHER, 2)
    assert torch.equal(pairs.student, pairs.teacher)
    assert pairs.object.tolist() == [[0, 0, -1, -1, 2, -1]] and pairs.teacher.tolist() == [[4, 0, 0, 0, 1, 0]]


def test_an_image_without_objects_has_no_pairs() -> None:
    pairs = rank_pairs(STUDENT[:, :0], TEACHER[:, :0])
    assert pairs.object.shape == (1, 0) and pairs.labels(torch.zeros(1, 0)).shape == (1, 0)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(TrainingError, match=r"\[1, 2, 5\].*\[1, 3, 5\] must have the same"):
        rank_pairs(STUDENT[:, :2], TEACHER)
    with pytest.raises(TrainingError, match="a count of at least 1"):
        shared_pairs(TEACHER, 0)
