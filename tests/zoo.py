"""Models of torchvision, timm and transformers on random weights and small inputs, for the breadth tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.layers import call

Made = tuple[nn.Module, Any]  # the model and a batch of its inputs


def _image_model(name: str, size: int = 64) -> Callable[[], Made]:
    def make() -> Made:
        from torchvision import models

        options = {"image_size": size} if name.startswith("vit") else {}
        model = models.get_model(name, weights=None, num_classes=10, **options)
        return model, torch.randn(2, 3, size, size)

    return make


def _segmenter(name: str) -> Callable[[], Made]:
    def make() -> Made:
        from torchvision.models import segmentation

        model = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=4)
        return model, torch.randn(2, 3, 64, 64)

    return make


class Detector(nn.Module):
    """A torchvision detector behind one tensor: its losses in training, its raw head outputs otherwise."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Any:
        if self.training:
            boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
            targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in images]
            return self.detector(list(images), targets)
        return self.detector.backbone(images)


def _detector(name: str, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        from torchvision.models import detection

        model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=3, **options)
        return Detector(model), torch.rand(2, 3, 96, 96)

    return make


def _timm(name: str, size: int, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        import timm

        return timm.create_model(name, num_classes=10, **options), torch.randn(2, 3, size, size)

    return make


def _language(kind: str) -> Callable[[], Made]:
    def make() -> Made:
        import transformers as hf

        tiny = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        tokens = torch.randint(3, 64, (2, 12))
        if kind == "llama":
            config = hf.LlamaConfig(**tiny, intermediate_size=64, num_key_value_heads=2, use_cache=False)
            return hf.LlamaForCausalLM(config), {"input_ids": tokens}
        if kind == "gpt2":
            config = hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, use_cache=False)
            return hf.GPT2LMHeadModel(config), {"input_ids": tokens}
        return hf.BertModel(hf.BertConfig(**tiny, intermediate_size=64)), {"input_ids": tokens}

    return make


def _detr() -> Made:
    import transformers as hf

    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = hf.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=32,
        num_queries=5, **layers, **heads,
    )  # fmt: skip
    return hf.DetrForObjectDetection(config), {"pixel_values": torch.randn(1, 3, 64, 64)}


def _owlvit() -> Made:
    import transformers as hf

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.OwlViTConfig(
        text_config={**small, "vocab_size": 64, "max_position_embeddings": 8},
        vision_config={**small, "image_size": 64, "patch_size": 16},
        projection_dim=32,
    )
    tokens = torch.randint(3, 60, (2, 8))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": torch.randn(1, 3, 64, 64)}
    return hf.OwlViTForObjectDetection(config), batch


READ_DIRECTLY = {"model.query_position_embeddings"}  # DETR reads this table's weight; ``calibrate`` refuses it

ZOO: dict[str, Callable[[], Made]] = {
    "torchvision:resnet18": _image_model("resnet18"),
    "torchvision:mobilenet_v3_small": _image_model("mobilenet_v3_small"),
    "torchvision:efficientnet_b0": _image_model("efficientnet_b0"),
    "torchvision:densenet121": _image_model("densenet121"),
    "torchvision:convnext_tiny": _image_model("convnext_tiny"),
    "torchvision:swin_t": _image_model("swin_t"),
    "torchvision:vit_b_16": _image_model("vit_b_16", 32),
    "torchvision:lraspp": _segmenter("lraspp_mobilenet_v3_large"),
    "torchvision:deeplabv3": _segmenter("deeplabv3_mobilenet_v3_large"),
    "torchvision:ssdlite320": _detector("ssdlite320_mobilenet_v3_large"),
    "torchvision:fasterrcnn_320": _detector("fasterrcnn_mobilenet_v3_large_320_fpn", min_size=96, max_size=96),
    "torchvision:retinanet": _detector("retinanet_resnet50_fpn", min_size=96, max_size=96),
    "timm:deit_tiny": _timm("deit_tiny_patch16_224", 64, img_size=64),
    "timm:tiny_vit_5m": _timm("tiny_vit_5m_224", 64),
    "timm:mobilevit_xxs": _timm("mobilevit_xxs", 64),
    "transformers:llama": _language("llama"),
    "transformers:gpt2": _language("gpt2"),
    "transformers:bert": _language("bert"),
    "transformers:detr": _detr,
    "transformers:owlvit": _owlvit,
}


def tensors(output: Any) -> list[Tensor]:
    """Return the float tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    return [t for item in output for t in tensors(item)] if isinstance(output, (list, tuple)) else []


def settle(model: nn.Module, batch: Any) -> None:
    """Let signals of a new network reach its outputs: fill weights that start at zero, set batch norms by the batch."""
    for parameter in model.parameters():
        if not parameter.any() and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        call(model.train(), batch)
    for norm, momentum in zip(norms, before):
        norm.momentum = momentum
