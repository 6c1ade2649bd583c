"""A packed open-vocabulary detector, asked for words: the file tells how to build it and which texts it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.deploy import load
from fewbits.deploy.file import read
from fewbits.errors import DataError, PackedFileError
from fewbits.layers import in_eval
from fewbits.tasks.data import normalize
from fewbits.tasks.detection_metrics import SEEN, Detections, Limits, detections
from fewbits.tasks.open_vocabulary.detector import OpenVocabularyDetector
from fewbits.tasks.open_vocabulary.sizes import SIZES
from fewbits.tasks.open_vocabulary.text import WIDTH, ClipText, ComposedText, TextEncoder
from fewbits.tasks.open_vocabulary.vocabulary import Vocabulary

KIND = "open-vocabulary detector"
COMPOSED = "composed"


def text_encoder(text: str, width: int | None = None) -> TextEncoder:
    """Return an encoder by its name: "composed", or the folder of a CLIP.

    width: of composed texts, None: 512. Raises DataError for a CLIP that cannot be read, and for a width of one.
    """
    if text == COMPOSED:
        return ComposedText(WIDTH if width is None else width)
    if width is not None:
        raise DataError(f"the CLIP {text!r} has a width of its own: leave the width {width} out")
    return ClipText(text)


@dataclass(frozen=True)
class Card:
    """What a packed file tells of its detector.

    size: its name in ``SIZES``. text: "composed", or the folder that the CLIP was read from. text_width, identity: of
    the encoder. side: height and width of the images that it was trained on. mean, std: of their channels, in 0..1.
    """

    size: str
    text: str
    text_width: int
    identity: str
    side: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def about(self) -> dict[str, Any]:
        """Return it as ``save`` takes it."""
        return {"kind": KIND, **asdict(self)}

    @staticmethod
    def of(path: Path) -> Card:
        """Read that of a packed file. Raises PackedFileError for one that holds another model."""
        about: Mapping[str, Any] = read(path)[1]["about"]
        if about.get("kind") != KIND:
            raise PackedFileError(
                f"{path} holds no open-vocabulary detector: give the model.safetensors of a run of task open_vocabulary"
            )
        try:
            tuples = {key: tuple(about[key]) for key in ("side", "mean", "std")}
            card = Card(**{**{key: value for key, value in about.items() if key != "kind"}, **tuples})
        except (KeyError, TypeError) as error:
            raise PackedFileError(f"{path} does not tell how to build its detector ({error}): pack it again") from error
        if card.size not in SIZES:
            raise PackedFileError(f"{path} holds a detector of size {card.size!r}, known: {list(SIZES)}")
        return card

    def encoder(self, text: str | None = None) -> TextEncoder:
        """Return the encoder that the detector was trained with. text: another folder, where that has moved.

        Raises DataError where it cannot be read, or is another one.
        """
        given = replace(self, text=text or self.text)
        try:
            found = text_encoder(given.text, self.text_width if given.text == COMPOSED else None)
        except DataError as error:
            raise DataError(f"{error}. The detector reads {self.identity!r}; name its folder with --encoder") from error
        if found.identity != self.identity:
            raise DataError(
                f"the detector was trained with texts of {self.identity!r}, {given.text!r} is {found.identity!r}: name "
                "the folder of the first with --encoder"
            )
        return found


@dataclass(frozen=True)
class AskedDetector:
    """A detector, packed or not, with its encoder of texts: it finds what words name."""

    model: OpenVocabularyDetector
    card: Card
    encoder: TextEncoder

    @staticmethod
    def open(path: Path, text: str | None = None) -> AskedDetector:
        """Read a packed file. text: see ``Card.encoder``. Raises PackedFileError and DataError."""
        card = Card.of(path)
        encoder = card.encoder(text)
        model = load(path, OpenVocabularyDetector(card.size, Vocabulary.of(encoder, ["object"])))
        assert isinstance(model, OpenVocabularyDetector)
        return AskedDetector(model, card, encoder)

    def find(self, image: Tensor, prompts: Sequence[str], score: float = SEEN) -> Detections:
        """Return what is found on an image, uint8 [3, H, W] of any size, in its pixels; labels index the prompts.

        The image keeps its aspect: what it leaves of ``card.side`` is filled with the mean colour. Raises DataError for
        prompts that are no vocabulary.
        """
        self.model.set_vocabulary(Vocabulary.of(self.encoder, prompts))
        inputs, zoom = letterboxed(image, self.card.side, self.card.mean, self.card.std)
        with in_eval(self.model), torch.no_grad():
            found = detections(self.model(inputs[None]), Limits(score))[0]
        height, width = image.shape[-2:]
        limits = torch.tensor([width, height, width, height])
        return replace(found, boxes=torch.minimum((found.boxes / zoom).clamp(min=0), limits))


def letterboxed(
    image: Tensor, side: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Scale an image, uint8 [3, H, W], into the upper left of ``side`` (height, width), with its aspect as far as whole
    pixels have it.

    Returns it normalised, float32 [3, *side], and what corners on the image were multiplied with, [4]: zoom of x and y,
    twice. What is left over is the mean colour, 0.
    """
    from torchvision.transforms.v2 import functional as vision

    sides = image.shape[-2:]
    zoom = min(wanted / now for wanted, now in zip(side, sides))
    inner = [max(1, round(now * zoom)) for now in sides]
    scaled = normalize(vision.resize(image, inner, antialias=True)[None], mean, std)[0]
    canvas = torch.zeros(3, *side)
    canvas[:, : inner[0], : inner[1]] = scaled
    return canvas, torch.tensor([inner[1] / sides[1], inner[0] / sides[0]]).repeat(2)
