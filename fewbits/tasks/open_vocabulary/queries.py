"""What a detector with queries says of a batch, and its distillation: DETR-like models, and models of image patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import TrainingError
from fewbits.losses.pairing import QUERIES, rank_pairs, shared_pairs
from fewbits.losses.tpsd import Joint, tpsd
from fewbits.tasks.open_vocabulary.assign import alignment, padded

PAIRINGS = ("rank", "shared")


@dataclass(frozen=True)
class Proposals:
    """What a decoder starts from: content [B, Q, D], and boxes as logits of cx, cy, w, h in 0..1, [B, Q, 4]."""

    content: Tensor
    references: Tensor


@dataclass(frozen=True)
class Queries:
    """The answer of the last layer, and what losses need of the others.

    embeddings: v, [B, Q, D]. texts: t, [T, D], or [B, T, D] where the image changes them. logits: [B, Q, T]. boxes:
    corners in pixels [B, Q, 4]. size: width and height of the images. layers: logits and boxes of every layer that is
    trained, the encoder's proposals included. features: of the backbone. proposals: None where queries do not depend on
    the image, so that equal indices mean the same in every model.
    """

    embeddings: Tensor
    texts: Tensor
    logits: Tensor
    boxes: Tensor
    size: tuple[int, int]
    layers: tuple[tuple[Tensor, Tensor], ...]
    features: tuple[Tensor, ...]
    proposals: Proposals | None = None


def query_distillation(
    student: Queries,
    teacher: Queries,
    targets: Tensor,
    *,
    pairing: str = "rank",
    count: int = QUERIES,
    variant: str = "full",
    beta: float = 1.0,
) -> Tensor:
    """Return TPSD of a batch, a scalar without its weight, at the best ``count`` queries of each object.

    targets: [B, M, 5]: label (index of a text), corners in pixels; label -1 is padding. pairing: "rank": each model's
    own r-th best; "shared": equal indices, at the teacher's best, for a student that answered with the teacher's
    proposals. variant, beta: see ``tpsd``. Raises TrainingError for an unknown pairing, and for "shared" where the
    student answered with proposals of its own.
    """
    if pairing not in PAIRINGS:
        raise TrainingError(f"pairing must be one of {PAIRINGS}, got {pairing!r}")
    theirs = fits(teacher, targets)
    if pairing == "rank":
        pairs = rank_pairs(fits(student, targets), theirs, count)
    else:
        if not same_proposals(student, teacher):
            raise TrainingError(
                "pairing 'shared' needs a student that answers with the teacher's proposals: call its "
                "predict(images, teacher.proposals), or use pairing='rank'"
            )
        pairs = shared_pairs(theirs, count)
    labels = pairs.labels(padded(targets, student.logits.shape[-1])[..., 0])
    mine = Joint(pairs.of_student(student.embeddings), student.texts)
    return tpsd(mine, Joint(pairs.of_teacher(teacher.embeddings), teacher.texts), labels, variant=variant, beta=beta)


@torch.no_grad()
def fits(found: Queries, targets: Tensor) -> Tensor:
    """Return how well each query fits each object, [B, M, Q], M at least 1; see ``alignment``."""
    return alignment(found.logits.sigmoid(), found.boxes, targets)


def same_proposals(student: Queries, teacher: Queries) -> bool:
    """Tell whether equal indices mean the same query."""
    if student.proposals is None or teacher.proposals is None:
        return student.proposals is teacher.proposals and student.boxes.shape == teacher.boxes.shape
    return torch.equal(student.proposals.references, teacher.proposals.references)


def corners(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return corners in pixels of boxes cx, cy, w, h in 0..1, [..., 4]. size: width and height."""
    middle, sides = boxes[..., :2], boxes[..., 2:]
    return torch.cat([middle - sides / 2, middle + sides / 2], -1) * boxes.new_tensor([*size, *size])


def centred(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return cx, cy, w, h in 0..1 of corners in pixels, [..., 4]."""
    low, high = torch.split(boxes / boxes.new_tensor([*size, *size]), 2, -1)
    return torch.cat([(low + high) / 2, high - low], -1)
