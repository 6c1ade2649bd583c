"""Tiny detectors of the transformers library with weights by chance."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.layers import calibrate, quantize
from fewbits.plan import Plan
from fewbits.tasks.open_vocabulary.adapters import LibraryDetector, library_policy
from fewbits.tasks.open_vocabulary.grounding import GroundingDino
from fewbits.tasks.open_vocabulary.omdet import OmDetTurbo
from fewbits.tasks.open_vocabulary.owl import OwlDetector
from fewbits.train import Curriculum, Stage


@contextlib.contextmanager
def quiet() -> Iterator[Any]:
    """Import transformers without its remarks on ids of tokens that tiny vocabularies do not have."""
    transformers = pytest.importorskip("transformers")
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield transformers
    finally:
        logger.setLevel(before)


def swin(transformers: Any) -> Any:
    return transformers.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        out_indices=[2, 3, 4],
    )


def omdet() -> OmDetTurbo:
    """Return OmDet-Turbo with two decoder layers and three texts."""
    with quiet() as transformers:
        text = transformers.CLIPTextConfig(
            vocab_size=64,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            eos_token_id=63,
            bos_token_id=62,
        )
        config = transformers.OmDetTurboConfig(
            backbone_config=swin(transformers),
            text_config=text,
            apply_layernorm_after_vision_backbone=False,
            text_projection_in_dim=24,
            text_projection_out_dim=24,
            class_embed_dim=24,
            task_encoder_hidden_dim=32,
            num_queries=12,
            encoder_in_channels=[16, 32, 64],
            d_model=32,
            encoder_attention_heads=4,
            encoder_dim_feedforward=32,
            vision_features_channels=[32, 32, 32],
            decoder_hidden_dim=32,
            decoder_num_heads=4,
            decoder_num_layers=2,
            decoder_dim_feedforward=32,
            decoder_num_points=2,
        )
        model = transformers.OmDetTurboForObjectDetection(config)
    return OmDetTurbo(shaken(model).eval(), token_ids(), token_ids()[:1], torch.ones(1, 5, dtype=torch.int64))


PROMPT = torch.tensor([[101, 7, 1012, 8, 9, 1012, 20, 1012, 102]])  # three phrases, the second of two tokens


def grounding(family: str) -> GroundingDino:
    """Return "GroundingDino" or "MMGroundingDino" with two layers of each kind and three texts."""
    with quiet() as transformers:
        text = transformers.BertConfig(
            vocab_size=1040, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
        config = getattr(transformers, f"{family}Config")(
            backbone_config=swin(transformers),
            text_config=text,
            num_queries=10,
            d_model=32,
            encoder_layers=1,
            encoder_ffn_dim=32,
            encoder_attention_heads=4,
            decoder_layers=2,
            decoder_ffn_dim=32,
            decoder_attention_heads=4,
            num_feature_levels=4,
            encoder_n_points=2,
            decoder_n_points=2,
            max_text_len=16,
            dropout=0.0,
            fusion_dropout=0.0,
            fusion_droppath=0.0,
            text_enhancer_dropout=0.0,
            auxiliary_loss=True,
        )
        model = getattr(transformers, f"{family}ForObjectDetection")(config)
    return GroundingDino(shaken(model).eval(), PROMPT)


def owl(family: str) -> OwlDetector:
    """Return "OwlViT" or "Owlv2" with 16 patches and three texts."""
    with quiet() as transformers:
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = getattr(transformers, f"{family}Config")(
            text_config={**sizes, "vocab_size": 64, "max_position_embeddings": 16},
            vision_config={**sizes, "image_size": 64, "patch_size": 16},
            projection_dim=32,
        )
        model = getattr(transformers, f"{family}ForObjectDetection")(config)
    return OwlDetector(shaken(model).eval(), token_ids(), torch.ones_like(token_ids()))


def token_ids() -> Tensor:
    """Return the ids of three texts, each ended by the token of the largest id."""
    return torch.tensor([[1, 5, 9, 4, 63], [2, 6, 8, 3, 63], [1, 7, 9, 3, 63]])


def shaken(model: nn.Module) -> nn.Module:
    """Return the model with no weight at zero, as the library starts what predicts boxes and where attention looks."""
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def quantize_in_haste(detector: LibraryDetector, batch: Tensor) -> LibraryDetector:
    """Quantize by the policy and calibrate, with the range of inputs and operands seen instead of a search for it.

    Any warning, such as of layers that no batch reaches, is an error.
    """
    rules = []
    for name, layer in library_policy(detector):
        assert layer is not None
        quick = {
            part: dataclasses.replace(plan, range="minmax")
            for part in ("input", "operands")
            if (plan := getattr(layer, part)) is not None
        }
        rules.append((name, dataclasses.replace(layer, **quick)))
    quantize(detector, Plan(tuple(rules)), verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(detector, [batch])
    return detector


def stages_of(detector: LibraryDetector) -> Curriculum:
    """Return the curriculum of the paper, by the names that the detector tells."""
    parts = detector.functional_modules()
    return Curriculum([Stage(parts["backbone"], 1 / 3), Stage((*parts.get("neck", ()), *parts["head"]), 2 / 3)])


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 64, 64)
