"""The bit map that Sony's Model Compression Toolkit (MCT) finds, by its mixed-precision ILP search.

MCT needs packages that fewbits' own environment cannot have (pydantic < 2.12, matplotlib < 3.10), so this file runs in
one of its own, on the float model and the calibration batches that ``benchmarks.sigmaquant --export-mct`` wrote, and
leaves {layer: bits} as JSON for the arm ``mct``:

    python -m venv mct && mct/bin/pip install torch==2.13.0 torchvision==0.28.0 model-compression-toolkit==2.6.1
    mct/bin/python benchmarks/peers/mct.py --given runs/sigmaquant/mct/resnet20_0.pt --out runs/sigmaquant/mct

Both sides search the same widths: the target platform is MCT's own default one (symmetric weights, a threshold per
channel; 8-bit activations) with the menu's widths in place of its 8, 4 and 2, and the two ends held at 8 bits through
its ``BitWidthConfig``. It is asked for the bytes of the weights, as our budget is. Where its solver finds nothing, the
file holds its own words.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

try:
    torch.ops.torchvision.nms  # noqa: B018
    import torchvision  # noqa: F401
except (AttributeError, RuntimeError):
    # A torchvision built for CUDA beside a CPU torch lacks its compiled operators. MCT imports it but calls none of
    # them here; declaring the two that the import looks for is enough.
    LIBRARY = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

sys.path.insert(0, str(Path(__file__).parents[2]))


def main() -> None:
    """Search once for every budget in the given file, and write what was found beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--given", type=Path, required=True, help="the file of --export-mct")
    parser.add_argument("--out", type=Path, required=True, help="folder for {model}_{seed}_{budget}.json")
    parser.add_argument("--images", type=int, default=32, help="of the calibration, for its sensitivity (its default)")
    args = parser.parse_args()
    given = torch.load(args.given, weights_only=True)
    model = load(given)
    args.out.mkdir(parents=True, exist_ok=True)
    for budget, weights_bytes in given["budgets"].items():
        start = time.perf_counter()
        found = search(model, given, weights_bytes, args.images)
        found |= {"seconds": round(time.perf_counter() - start, 1), "budget": budget, "weight_bytes": weights_bytes}
        path = args.out / f"{args.given.stem}_{budget}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(path.name, found.get("error") or f"{found['found_bytes']} of {weights_bytes:.0f} bytes", flush=True)


def load(given: dict[str, Any]) -> nn.Module:
    """Return the float model."""
    from fewbits.tasks.models import build_model

    model = build_model(given["model"], num_classes=10)
    model.load_state_dict(given["state"])
    return model.eval()


def search(model: nn.Module, given: dict[str, Any], weights_bytes: float, images: int) -> dict[str, Any]:
    """Return {"bits": {layer: bits}} of MCT's search within so many bytes of weights, or {"error": its words}."""
    import model_compression_toolkit as mct

    batches = [batch.numpy() for batch in given["batches"]]
    core = mct.core.CoreConfig(
        mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig(num_of_images=images),
        bit_width_config=_held(model, given["ends"]),
    )
    try:
        quantized, _ = mct.ptq.pytorch_post_training_quantization(
            model,
            lambda: ([batch] for batch in batches),
            target_resource_utilization=mct.core.ResourceUtilization(weights_memory=weights_bytes),
            core_config=core,
            target_platform_capabilities=_platform(given["menu"]),
        )
    except Exception as error:  # it raises plain Exception where the ILP has no solution
        return {"error": f"{type(error).__name__}: {error}", "version": mct.__version__}
    bits = _bits(quantized, [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)])
    found = sum(model.get_submodule(name).weight.numel() * b for name, b in bits.items()) / 8
    return {"bits": bits, "found_bytes": found, "version": mct.__version__}


def _platform(menu: list[int]) -> Any:
    """Return MCT's default platform with other widths of weights."""
    from model_compression_toolkit.target_platform_capabilities.constants import KERNEL_ATTR, WEIGHTS_N_BITS
    from model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0 import tpc

    base, _, default = tpc.get_op_quantization_configs()
    widths = sorted({8, *menu}, reverse=True)  # the widest is its base
    options = [base.clone_and_edit(attr_to_edit={KERNEL_ATTR: {WEIGHTS_N_BITS: b}}) for b in widths]
    return tpc.generate_tpc(default, options[0], options, "menu")


def _held(model: nn.Module, ends: list[str]) -> Any:
    """Return the configuration that holds these layers at 8 bits."""
    import model_compression_toolkit as mct
    from model_compression_toolkit.core.common.network_editors import NodeNameFilter

    config = mct.core.BitWidthConfig()
    for name in ends:
        node = name.replace(".", "_")  # with what it folds into the layer behind
        config.set_manual_weights_bit_width(NodeNameFilter(node) | NodeNameFilter(f"{node}_bn"), 8, "weight")
    return config


def _bits(quantized: nn.Module, layers: list[str]) -> dict[str, int]:
    """Return the bits of every layer by its name in our model; MCT writes dots as _ and adds what it folded."""
    found = {}
    for node, module in quantized.named_modules():
        quantizer = getattr(module, "weights_quantizers", {}).get("weight")
        if quantizer is not None:
            found[node.removesuffix("_bn")] = int(quantizer.num_bits)
    bits = {name: found.pop(name.replace(".", "_"), None) for name in layers}
    if found or None in bits.values():
        raise RuntimeError(f"MCT quantized {sorted(found)}, and did not {[n for n, b in bits.items() if b is None]}")
    return bits


if __name__ == "__main__":
    main()
