"""An open-vocabulary detector: CSP backbone, a neck where texts gate the image, and heads that compare both.

"YOLO-World: Real-Time Open-Vocabulary Object Detection" (Cheng et al. 2024, arXiv 2401.17270), its first version. The
children ``backbone``, ``neck`` and ``heads`` are what a curriculum quantizes one after the other. Texts come as
embeddings; the encoder that made them is no part of the model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import DataError
from fewbits.tasks.detector import STRIDES, grid
from fewbits.tasks.open_vocabulary.attention import Baked, ImagePoolingAttention
from fewbits.tasks.open_vocabulary.blocks import CSP, PyramidPooling, TextCSP, conv, joint
from fewbits.tasks.open_vocabulary.regions import SIDE_BINS, Regions
from fewbits.tasks.open_vocabulary.sizes import Size, size_of
from fewbits.tasks.open_vocabulary.vocabulary import Vocabulary

TEMPERATURE = 0.07  # of cosines, at the start
PRIOR_OBJECTS, PRIOR_CLASSES, PRIOR_SIDE = 5, 80, 640  # an image of this side holds that many objects, at the start

Features = tuple[Tensor, Tensor, Tensor]


class Backbone(nn.Module):
    """From images to features at strides 8, 16 and 32."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = size.widths
        d2, d3, d4, d5 = size.depths
        self.stem = conv(3, c1, 3, 2)
        self.stage2 = nn.Sequential(conv(c1, c2, 3, 2), CSP(c2, c2, d2, True))
        self.stage3 = nn.Sequential(conv(c2, c3, 3, 2), CSP(c3, c3, d3, True))
        self.stage4 = nn.Sequential(conv(c3, c4, 3, 2), CSP(c4, c4, d4, True))
        self.stage5 = nn.Sequential(conv(c4, c5, 3, 2), CSP(c5, c5, d5, True), PyramidPooling(c5))

    def forward(self, x: Tensor) -> Features:
        """Return [B, c3, H/8, W/8], [B, c4, H/16, W/16], [B, c5, H/32, W/32]."""
        p3 = self.stage3(self.stage2(self.stem(x)))
        p4 = self.stage4(p3)
        return p3, p4, self.stage5(p4)


class Neck(nn.Module):
    """Path aggregation without lateral convolutions, every fusion gated by texts.

    Top-down blocks see the texts as they are; the bottom-up ones see texts that have looked at the image.
    """

    def __init__(self, size: Size, text_width: int) -> None:
        super().__init__()
        c3, c4, c5 = size.widths[2:]

        def block(width_in: int, width: int) -> TextCSP:
            return TextCSP(width_in, width, size.neck, text_width, size.head_width)

        self.fuse4, self.fuse3, self.fuse4_up, self.fuse5_up = (joint() for _ in range(4))
        self.top4, self.top3 = block(c5 + c4, c4), block(c4 + c3, c3)
        self.enhance = ImagePoolingAttention((c3, c4, c5), text_width, size.enhancer, size.head_width)
        self.down3, self.out4 = conv(c3, c3, 3, 2), block(c3 + c4, c4)
        self.down4, self.out5 = conv(c4, c4, 3, 2), block(c4 + c5, c5)

    def forward(self, features: Features, texts: Tensor) -> Features:
        """Return the shapes of the features, at strides 8, 16 and 32. texts: [T, D]."""
        p3, p4, p5 = features
        t4 = self.top4(self.fuse4(_up(p5), p4), texts)
        o3 = self.top3(self.fuse3(_up(t4), p3), texts)
        seen = self.enhance((o3, t4, p5), texts)
        o4 = self.out4(self.fuse4_up(self.down3(o3), t4), seen)
        return o3, o4, self.out5(self.fuse5_up(self.down4(o4), p5), seen)


class Head(nn.Module):
    """Region embeddings and distributions of the sides at one stride, and the scale and shift of its cosines."""

    def __init__(self, width: int, size: Size, text_width: int, stride: int) -> None:
        super().__init__()
        self.class_tower = nn.Sequential(conv(width, size.classes, 3), conv(size.classes, size.classes, 3))
        self.box_tower = nn.Sequential(conv(width, size.box, 3), conv(size.box, size.box, 3))
        self.class_out, self.box_out = nn.Conv2d(size.classes, text_width, 1), nn.Conv2d(size.box, 4 * SIDE_BINS, 1)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / TEMPERATURE)))
        prior = math.log(PRIOR_OBJECTS / PRIOR_CLASSES / (PRIOR_SIDE / stride) ** 2)
        self.shift = nn.Parameter(torch.tensor(prior))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings [B, H * W, D] and side logits [B, H * W, 4, SIDE_BINS]."""
        embeddings, sides = self.class_out(self.class_tower(x)), self.box_out(self.box_tower(x))
        return embeddings.flatten(2).mT, sides.flatten(2).mT.unflatten(2, (4, SIDE_BINS))

    def compare(self, embeddings: Tensor, texts: Tensor) -> Tensor:
        """Return logits [B, points, T]: exp(scale) cos(v, t) + shift, never quantized."""
        return self.log_scale.exp() * (F.normalize(embeddings, dim=-1) @ texts.mT) + self.shift


class OpenVocabularyDetector(nn.Module):
    """Images [B, 3, H, W] to boxes and scores [B, points, 4 + T] of a vocabulary; H and W are multiples of 32.

    Boxes are corners x1, y1, x2, y2 in pixels, scores are 0..1 for every text by itself. The vocabulary can be changed
    at any time (``set_vocabulary``), also to one of another length, but not its width; weights and packed files do not
    depend on it until ``reparameterize``.
    """

    texts: Tensor
    baked: Vocabulary | None = None

    def __init__(self, size: str | Size, vocabulary: Vocabulary) -> None:
        super().__init__()
        size = size_of(size) if isinstance(size, str) else size
        self.text_width = vocabulary.width
        self.backbone, self.neck = Backbone(size), Neck(size, vocabulary.width)
        self.heads = nn.ModuleList(
            Head(width, size, vocabulary.width, stride) for width, stride in zip(size.widths[2:], STRIDES)
        )
        self.register_buffer("texts", torch.empty(0, vocabulary.width), persistent=False)
        self.set_vocabulary(vocabulary)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for head in self._heads():
            nn.init.normal_(head.box_out.weight, std=0.01)
            nn.init.ones_(head.box_out.bias)  # type: ignore[arg-type]

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Look for these texts from now on. Raises DataError for embeddings of another width, or once the vocabulary is
        fixed."""
        if self.baked is not None:
            raise DataError(
                f"this detector was reparameterized for {len(self.baked)} texts: it has no layers for others any more; "
                "keep a copy of it from before"
            )
        self.vocabulary = vocabulary
        self.texts = self._unit(vocabulary.embeddings)

    def reparameterize(self, vocabulary: Vocabulary) -> OpenVocabularyDetector:
        """Fix the vocabulary, in place: what depends on texts alone is computed once, its layers go. Returns itself.

        These are the guides of the top-down blocks and the queries of image-pooling attention (YOLO-World, section 3.3,
        re-parameterization); what looks at the image stays. The texts then are part of the state. Answers are the same.
        """
        self.set_vocabulary(vocabulary)
        neck, training = self.neck, self.training
        self.eval()
        with torch.no_grad():
            for block in (neck.top4, neck.top3):
                block.attention.guide = Baked(block.attention.guide(self.texts))
            neck.enhance.query = Baked(neck.enhance.query(self.texts))
        self.register_buffer("texts", self.texts, persistent=True)
        self.baked = vocabulary
        return self.train(training)

    def forward(self, images: Tensor, regions: bool = False) -> Tensor | Regions:
        """See the class; regions: all that ``predict`` returns. Raises DataError for sides that are no multiples of
        32."""
        found = self.predict(images)
        return found if regions else torch.cat([found.boxes, found.logits.sigmoid()], 2)

    def predict(self, images: Tensor, texts: Tensor | None = None) -> Regions:
        """Return what the heads say of every point.

        texts: embeddings [T, D] in place of those of the vocabulary, of any length, T at least 1. Raises DataError for
        another shape, or if the vocabulary is fixed.
        """
        if any(side % STRIDES[-1] for side in images.shape[-2:]):
            raise DataError(f"height and width must be multiples of {STRIDES[-1]}, got {list(images.shape[-2:])}")
        texts = self.texts if texts is None else self._other(texts)
        features: Features = self.backbone(images)
        levels: Features = self.neck(features, texts)
        embeddings, sides = zip(*(head(x) for head, x in zip(self.heads, levels)))
        logits = [head.compare(v, texts) for head, v in zip(self._heads(), embeddings)]
        points, strides = grid([(x.shape[-2], x.shape[-1]) for x in levels], images.device)
        joined = torch.cat(sides, 1)
        boxes = boxes_of(joined, points, strides)
        return Regions(torch.cat(embeddings, 1), texts, torch.cat(logits, 1), boxes, joined, points, strides, features)

    def _heads(self) -> list[Head]:
        return [head for head in self.heads if isinstance(head, Head)]

    def _other(self, texts: Tensor) -> Tensor:
        if self.baked is not None:
            raise DataError(
                "this detector was reparameterized: it looks for the texts that it was fixed to, and no others"
            )
        return self._unit(texts)

    def _unit(self, texts: Tensor) -> Tensor:
        """Return embeddings of unit length on our device."""
        if texts.ndim != 2 or not len(texts) or texts.shape[1] != self.text_width:
            raise DataError(
                f"texts must be [T, {self.text_width}] with T of at least 1, got {list(texts.shape)}: this detector "
                f"reads embeddings of width {self.text_width}"
            )
        return F.normalize(texts.to(self.texts), dim=-1)


def boxes_of(sides: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Return corners in pixels [B, points, 4]: the mean distance of each side's distribution, in strides.

    sides: logits [B, points, 4, SIDE_BINS] of left, top, right, bottom. "Generalized Focal Loss" (Li et al. 2020),
    eq. 4.
    """
    bins = torch.arange(SIDE_BINS, device=sides.device, dtype=sides.dtype)
    reach = (sides.softmax(-1) * bins).sum(-1) * strides[:, None]
    return torch.cat([points - reach[..., :2], points + reach[..., 2:]], -1)


def _up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
