"""TPSD: the student keeps how similar the regions of one text are to the text and to each other.

Text-anchored pairwise similarity distillation, arXiv 2603.05964 v3 (TRKD in v1). Plain functions of tensors: which
regions belong to which text is told by the caller (``fewbits/tasks/open_vocabulary/relations.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import TrainingError

VARIANTS = ("full", "region-text", "region-region")


@dataclass(frozen=True)
class Joint:
    """What one model says of a batch in its joint space; lengths do not matter.

    embeddings: of regions, v, [B, N, D]. texts: t, [T, D], or [B, T, D] where each image has its own.
    """

    embeddings: Tensor
    texts: Tensor

    def of(self, image: int) -> tuple[Tensor, Tensor]:
        """Return the embeddings [N, D] and texts [T, D] of one image."""
        return self.embeddings[image], self.texts if self.texts.ndim == 2 else self.texts[image]


def tpsd(student: Joint, teacher: Joint, labels: Tensor, *, variant: str = "full", beta: float = 1.0) -> Tensor:
    """Return the loss of a batch, a scalar: the mean over images with a positive region; zero where none has one.

    student, teacher: the same N regions and T texts; only their widths D may differ. labels: int64 [B, N], the text c
    of each region, -1 where it is not a positive. variant: what counts of the similarities [1 + N_c, 1 + N_c] of one
    image and text: "region-text" the first row and column, "region-region" the others, "full" all; always over
    (1 + N_c)^2, so that the first two sum to the third. beta: of smooth L1. In float32; no gradient goes to the
    teacher. Raises TrainingError for an unknown variant, a beta that is not above 0, and shapes or labels that do not
    fit.
    """
    _check(student, teacher, labels, variant, beta)
    losses = []
    for image in (labels >= 0).any(1).nonzero().flatten().tolist():
        positive = labels[image] >= 0
        used, group = torch.unique(labels[image][positive], return_inverse=True)
        rows = [torch.cat([t[used], v[positive]]) for v, t in (student.of(image), teacher.of(image))]
        losses.append(image_tpsd(rows[0], rows[1], group, variant, beta))
    return torch.stack(losses).mean() if losses else student.embeddings.float().sum() * 0.0


def image_tpsd(student: Tensor, teacher: Tensor, group: Tensor, variant: str, beta: float) -> Tensor:
    """Return the loss of one image: the mean over its m texts of smooth L1 between the similarities, each over
    (1 + N_c)^2.

    student, teacher: rows of the m texts with a positive, then of the N regions, [m + N, D]. group: the text of each
    region, int64 [N] in 0..m-1.
    """
    texts = len(student) - len(group)
    group = torch.cat([torch.arange(texts, device=group.device), group])
    with torch.autocast(student.device.type, enabled=False):
        error = F.smooth_l1_loss(similarity(student), similarity(teacher.detach()), beta=beta, reduction="none")
    related = group[:, None] == group
    if variant != "full":
        text = torch.arange(len(group), device=group.device) < texts
        with_text = text[:, None] | text
        related = related & (with_text if variant == "region-text" else ~with_text)
    sizes = group.bincount(minlength=texts)[group]  # 1 + N_c of each row
    return (error * related / sizes[:, None] ** 2).sum() / texts


def similarity(rows: Tensor) -> Tensor:
    """Return the cosine similarities of all pairs of rows [N, D], float32 [N, N]."""
    unit = F.normalize(rows.float(), dim=-1)
    return unit @ unit.mT


def _check(student: Joint, teacher: Joint, labels: Tensor, variant: str, beta: float) -> None:
    if variant not in VARIANTS:
        raise TrainingError(f"variant must be one of {VARIANTS}, got {variant!r}")
    if not beta > 0:
        raise TrainingError(f"beta of smooth L1 must be above 0, got {beta}")
    regions, texts = [m.embeddings.shape for m in (student, teacher)], [m.texts.shape for m in (student, teacher)]
    if regions[0][:2] != regions[1][:2] or texts[0][-2] != texts[1][-2]:
        raise TrainingError(
            f"the student has embeddings {list(regions[0])} and texts {list(texts[0])}, the teacher {list(regions[1])} "
            f"and {list(texts[1])}: only widths may differ; give both models the same batch and texts"
        )
    if labels.shape != student.embeddings.shape[:2] or labels.is_floating_point():
        raise TrainingError(
            f"labels must be integers {list(student.embeddings.shape[:2])}, one a region, got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    if labels.numel() and int(labels.max()) >= student.texts.shape[-2]:
        raise TrainingError(f"label {int(labels.max())} has no text: there are {student.texts.shape[-2]}")
