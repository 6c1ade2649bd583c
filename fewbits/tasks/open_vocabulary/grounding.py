"""Grounding DINO (Liu et al. 2023, arXiv 2303.05499) and MM-Grounding-DINO (Zhao et al. 2024, arXiv 2401.02361).

Both of the transformers library, whose own loss trains their decoder. LLMDet has the form of the second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import DataError
from fewbits.tasks.open_vocabulary.adapters import Anatomy, LibraryDetector
from fewbits.tasks.open_vocabulary.assign import padded
from fewbits.tasks.open_vocabulary.detr_loss import layer_loss
from fewbits.tasks.open_vocabulary.queries import Proposals, Queries, centred, corners

SEPARATORS = (0, 101, 102, 1012, 1029)  # [PAD], [CLS], [SEP], full stop and question mark in BERT's vocabulary


class GroundingDino(LibraryDetector):
    """``GroundingDinoForObjectDetection`` or ``MMGroundingDinoForObjectDetection`` with fixed texts.

    ids: of the prompt "[CLS] cat . dog . [SEP]", int64 [1, L]; its phrases are the texts, in their order. Raises
    DataError for another shape, a prompt without a phrase, and a model of one stage.

    The image changes the texts, so the text encoder runs with each batch. v: the last decoder layer's hidden state; t:
    the mean of a phrase's tokens behind the encoder; logits: the mean of the tokens' logits, which are v t.
    """

    anatomy = Anatomy(
        backbone=("model.model.backbone",),
        neck=("model.model.input_proj_vision", "model.model.level_embed", "model.model.encoder"),
        head=(
            "model.model.query_position_embeddings",
            "model.model.enc_output",
            "model.model.enc_output_norm",
            "model.model.encoder_output_bbox_embed",
            "model.model.encoder_output_class_embed",
            "model.model.decoder",
            "model.class_embed",
            "model.bbox_embed",
        ),
        text=("model.model.text_backbone", "model.model.text_projection"),
        floats=("*bbox_embed.*.layers.2", "model.model.encoder_output_bbox_embed.layers.2"),
    )
    ids: Tensor
    phrases: Tensor

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        super().__init__(model)
        if not self.model.config.two_stage:
            raise DataError("only Grounding DINO with two_stage=True, whose encoder proposes queries, is supported")
        if ids.ndim != 2 or len(ids) != 1:
            raise DataError(f"Grounding DINO takes the ids of one prompt for all images, [1, L], got {list(ids.shape)}")
        self.register_buffer("ids", ids)
        self.register_buffer("phrases", phrase_tokens(ids[0]))

    def backbone_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return maps [B, C, H, W] at strides 8, 16 and 32."""
        mask = torch.ones(len(images), *images.shape[-2:], dtype=torch.int64, device=images.device)
        return tuple(feature for feature, _ in self.model.model.backbone.conv_encoder(images, mask))

    def predict(self, images: Tensor) -> Queries:
        """Return the answer; ``layers`` holds the proposals and the last layer."""
        return self._answer(images)[0]

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Queries]:
        """Return the library's loss of all decoder layers with ours of the proposals, and the answer.

        The library stops the gradient at the proposals, so its loss alone would never train what makes them.
        """
        size = (images.shape[-1], images.shape[-2])
        labels = [
            {"class_labels": rows[:, 0].long(), "boxes": centred(rows[:, 1:], size)}
            for rows in (t[t[:, 0] >= 0] for t in padded(targets, len(self.phrases)))
        ]
        found, out = self._answer(images, labels=labels)
        return out.loss + layer_loss(*found.layers[0], padded(targets, len(self.phrases)), size), found

    def _answer(self, images: Tensor, **given: Any) -> tuple[Queries, Any]:
        batch, size, features = len(images), (images.shape[-1], images.shape[-2]), []
        catch = self.model.model.backbone.conv_encoder.register_forward_hook(lambda m, a, y: features.extend(y))
        try:
            ids = self.ids.expand(batch, -1)
            out = self.model(images, ids, attention_mask=(ids != 0).long(), return_dict=True, **given)
        finally:
            catch.remove()
        last = self._texts_of(out.logits), corners(out.pred_boxes, size)
        layers = (self._proposed(out, size), last)
        texts = self._share() @ out.encoder_last_hidden_state_text
        content = out.intermediate_hidden_states[:, -1]
        start = Proposals(content.detach(), out.init_reference_points.logit(1e-5))
        return Queries(content, texts, *last, size, layers, tuple(f for f, _ in features), start), out

    def _share(self) -> Tensor:
        """Return what to multiply tokens with for the mean of each phrase, [T, L]."""
        return self.phrases / self.phrases.sum(1, keepdim=True)

    def _texts_of(self, tokens: Tensor) -> Tensor:
        """Return logits of texts [.., T] from those of tokens [.., longest text], which are -inf for no token."""
        kept = tokens[..., : self.phrases.shape[1]].masked_fill(~self.phrases.any(0), 0.0)
        logits: Tensor = kept @ self._share().T
        return logits

    def _proposed(self, out: Any, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return logits and boxes of the places of the encoder's maps that the decoder starts from, with gradients."""
        best = out.enc_outputs_class.amax(-1).topk(out.logits.shape[1], 1).indices[..., None]
        boxes = out.enc_outputs_coord_logits.gather(1, best.expand(-1, -1, 4)).sigmoid()
        tokens = out.enc_outputs_class.gather(1, best.expand(-1, -1, out.enc_outputs_class.shape[-1]))
        return self._texts_of(tokens), corners(boxes, size)


def phrase_tokens(ids: Tensor) -> Tensor:
    """Return which tokens belong to each phrase, bool [T, L], of a prompt's ids [L]. Raises DataError without one."""
    between = torch.isin(ids, ids.new_tensor(SEPARATORS))
    group = between.cumsum(0).masked_fill(between, -1)
    numbers = torch.unique(group[~between])
    if not len(numbers):
        raise DataError(f"the prompt {ids.tolist()} has no phrase: write '[CLS] cat . dog . [SEP]'")
    found: Tensor = group == numbers[:, None]
    return found
