"""OmDet-Turbo (Zhao et al. 2024, arXiv 2403.06892) of the transformers library, with the training that it lacks there.

Texts are encoded once, past the library's caches, whose entries would keep the graph of an old step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import DataError
from fewbits.tasks.open_vocabulary.adapters import Anatomy, LibraryDetector
from fewbits.tasks.open_vocabulary.queries import Proposals, Queries, corners


class OmDetTurbo(LibraryDetector):
    """``OmDetTurboForObjectDetection`` with fixed texts.

    classes: token ids of the T class names, int64 [T, L]. task, task_mask: token ids of the task's text, such as
    "Detect cat, dog.", and 1 where there is a token, int64 [1, L]. Raises DataError for other shapes.

    v: the last decoder layer's hidden state; t: that layer's projection of the class embeddings, which is trained.
    """

    anatomy = Anatomy(
        backbone=("model.vision_backbone",),
        neck=("model.encoder",),
        head=("model.decoder",),
        text=("model.language_backbone",),
        floats=("model.decoder.decoder_bbox_head.*.layers.2",),
    )
    class_features: Tensor
    task_features: Tensor
    task_mask: Tensor

    def __init__(self, model: nn.Module, classes: Tensor, task: Tensor, task_mask: Tensor) -> None:
        super().__init__(model)
        if classes.ndim != 2 or task.ndim != 2 or len(task) != 1 or task.shape != task_mask.shape:
            raise DataError(
                "OmDet-Turbo takes ids of class names [T, L] and of one task [1, L] with its mask, got "
                f"{list(classes.shape)}, {list(task.shape)} and {list(task_mask.shape)}"
            )
        encoder, training = self.model.language_backbone, self.model.language_backbone.training
        with torch.no_grad():
            encoder.eval()
            names = encoder(classes, encode_type="class")
            words, mask = encoder(task, mask=task_mask, encode_type="task")
            encoder.train(training)
        self.register_buffer("class_features", names)  # [T, D]
        self.register_buffer("task_features", words[:, 0])  # [L, D]
        self.register_buffer("task_mask", mask[0])  # [L]

    def float_layers(self) -> tuple[str, ...]:
        """Return the last class and box layers; the class layers before only serve training."""
        last = len(self.model.decoder.decoder_class_head) - 1
        return (*self.anatomy.floats, f"model.decoder.decoder_class_head.{last}")

    def backbone_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return maps [B, C, H, W] at strides 8, 16 and 32."""
        return tuple(self.model.vision_backbone(images))

    def predict(self, images: Tensor, proposals: Proposals | None = None) -> Queries:
        """Return the answer; with ``proposals``, such as the teacher's, that of a decoder that starts from them.

        ``layers`` holds every decoder layer only in training: else the library computes but the last.
        """
        features = self.backbone_features(images)
        states = self.model.encoder(features, return_dict=True).extracted_states
        return self.decode(features, states, (images.shape[-1], images.shape[-2]), proposals)

    def decode(
        self,
        features: tuple[Tensor, ...],
        states: tuple[Tensor, ...],
        size: tuple[int, int],
        proposals: Proposals | None = None,
    ) -> Queries:
        """Return the answer from the encoder's maps; features and size are what ``Queries`` tells of them."""
        decoder, batch = self.model.decoder, len(states[0])
        with start_of(decoder, proposals) as used:
            out = decoder(
                states,
                self.class_features[:, None].expand(-1, batch, -1),
                self.task_features[:, None].expand(-1, batch, -1),
                self.task_mask.expand(batch, -1),
                return_dict=True,
            )
        layers = [(out.encoder_class_logits, out.encoder_coord_logits)] if proposals is None else []
        layers += list(zip(out.decoder_classes, out.decoder_coords))
        layers = [(logits, corners(boxes, size)) for logits, boxes in layers]
        texts = decoder.decoder_class_head[-1](self.class_features)
        return Queries(out.last_hidden_state, texts, *layers[-1], size, tuple(layers), features, used[0])


@contextlib.contextmanager
def start_of(decoder: Any, proposals: Proposals | None) -> Iterator[list[Proposals]]:
    """Let the decoder start from given proposals inside the block, or from its own; yields the list that then holds
    those it started from.

    Anchors are computed anew each time: the library's cache of them would hand tensors of a trace to what runs after.
    """
    used: list[Proposals] = []
    select = decoder._get_decoder_input

    def given(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        content, references, *rest = select(*args, **kwargs)
        start = Proposals(content, references) if proposals is None else proposals
        used.append(Proposals(start.content.detach(), start.references.detach()))
        return start.content, start.references, *rest

    decoder._get_decoder_input = given
    decoder.generate_anchors = functools.partial(type(decoder).generate_anchors.__wrapped__, decoder)
    try:
        yield used
    finally:
        del decoder._get_decoder_input, decoder.generate_anchors
