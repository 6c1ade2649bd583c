"""OWL-ViT (Minderer et al. 2022, arXiv 2205.06230) and OWLv2 (2023, arXiv 2306.09683) of the transformers library.

Every patch of the image is a query, so equal indices mean the same in every model. The library has no loss for them.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fewbits.errors import DataError
from fewbits.tasks.open_vocabulary.adapters import Anatomy, LibraryDetector
from fewbits.tasks.open_vocabulary.queries import Queries, corners


class OwlDetector(LibraryDetector):
    """``OwlViTForObjectDetection`` or ``Owlv2ForObjectDetection`` with fixed texts.

    ids, mask: token ids of the T texts, and 1 where there is a token, int64 [T, L]. Raises DataError for other shapes.

    v: what the class head projects a patch to; t: the embedding of the text. The score of OWLv2 that there is any
    object, for queries by image, is not used and is frozen.
    """

    anatomy: ClassVar[Anatomy]
    pairing = "shared"
    queries: Tensor

    def __init__(self, model: nn.Module, ids: Tensor, mask: Tensor) -> None:
        self.anatomy = anatomy(family(model))  # type: ignore[misc]  # names begin with the family's
        super().__init__(model)
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise DataError(f"OWL takes ids of texts [T, L] with their mask, got {list(ids.shape)}, {list(mask.shape)}")
        for name, parameter in self.named_parameters():
            if not name.startswith((*self.anatomy.backbone, *self.anatomy.head)):
                parameter.requires_grad_(False)  # such as of queries by image: no text leads to it
        with torch.no_grad():
            texts = getattr(self.model, family(model)).get_text_features(ids, mask).pooler_output
        self.register_buffer("queries", texts)  # [T, D]

    def backbone_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the patches behind the last layer of the vision transformer, as one map [B, D, patches]."""
        vision = getattr(self.model, family(self.model)).vision_model
        return (vision(images).last_hidden_state[:, 1:].mT,)

    def predict(self, images: Tensor) -> Queries:
        """Return the answer. Images must have the size that the model was made for."""
        grid, seen = self.model.image_embedder(images)
        patches = grid.flatten(1, 2)  # [B, Q, D]
        logits, embeddings = self.model.class_predictor(patches, self.queries.expand(len(images), -1, -1))
        size = (images.shape[-1], images.shape[-2])
        boxes = corners(self.model.box_predictor(patches, grid), size)
        features = (seen.last_hidden_state[:, 1:].mT,)
        return Queries(embeddings, self.queries, logits, boxes, size, ((logits, boxes),), features)


def family(model: nn.Module) -> str:
    """Return the attribute that holds the two encoders: "owlvit" or "owlv2". Raises DataError for another model."""
    for name in ("owlvit", "owlv2"):
        if hasattr(model, name):
            return name
    raise DataError(f"need an OwlViTForObjectDetection or Owlv2ForObjectDetection, got a {type(model).__name__}")


def anatomy(name: str) -> Anatomy:
    """Return the names of the parts; there is no neck, and the norm of the patches counts to the head."""
    return Anatomy(
        backbone=(f"model.{name}.vision_model",),
        neck=(),
        head=("model.layer_norm", "model.class_head", "model.box_head"),
        text=(f"model.{name}.text_model", f"model.{name}.text_projection"),
        floats=("model.class_head.*", "model.box_head.dense2"),
    )
