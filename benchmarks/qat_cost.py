"""What quantization-aware training costs: time and memory of one training step as ratios to float.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.qat_cost --models resnet20 vit --modes eager compile --rss --markdown cost.md

All arms (see ``peers``) run W4A4 in one process, a step each in turn and in random order, so that a busy
machine slows them all; the ratio is taken within each round. A step is forward, loss, backward and SGD with
momentum on the CIFAR ResNet-20 (batch 128, 32 px) or on a vision transformer of DeiT-tiny's width with six
blocks (batch 32, 64 px, patches of 8). "Kept" are the bytes of tensors alive between forward and backward,
"peak" the most alive at any time of a step, both counted at the allocator above what lived before the step;
"RSS" is the rise of the resident memory in a step, in a fresh process for each arm.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import CLOCKS, Spread, TensorMemory, interleave, peak_rss, ratios, tensor_memory
from benchmarks.peers import ARMS, PeerUnavailableError, Widths, prepare

DEFAULT_ARMS = ("float", "fewbits-lsq", "fewbits-ste", "brevitas", "brevitas-learned", "torch.ao", "torchao")


def resnet20() -> nn.Module:
    from fewbits.tasks.models import build_model

    return build_model("resnet20", num_classes=10)


def vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}
    model: nn.Module = VisionTransformer(**sizes, num_classes=10)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20": (resnet20, (128, 3, 32, 32)),
    "vit": (vit, (32, 3, 64, 64)),
}


@dataclass
class Arm:
    """One model under measurement. step: a whole training step; forward: up to the loss."""

    model: nn.Module
    quantized: int
    layers: int
    setup: str
    forward: Callable[[], Tensor]
    step: Callable[[], None]


@dataclass(frozen=True)
class Row:
    """The result of one arm; times in milliseconds, memory in bytes, ratios to float."""

    model: str
    mode: str
    arm: str
    layers: str
    ms: Spread
    time_ratio: Spread
    memory: TensorMemory
    kept_ratio: float
    peak_ratio: float
    first_step_s: float
    rss_bytes: int | None
    setup: str


def build_arm(model_name: str, mode: str, arm: str) -> Arm:
    """Return a freshly built, calibrated (and, for mode ``compile``, compiled) model of one arm."""
    torch.manual_seed(0)
    build, shape = MODELS[model_name]
    images, labels = torch.randn(shape), torch.randint(10, (shape[0],))
    prepared = prepare(arm, build(), Widths(4, 4), [images])
    model = prepared.model.train()
    run = torch.compile(model) if mode == "compile" else model
    groups = prepared.groups(1e-3, 1e-4) if prepared.groups else model.parameters()
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def forward() -> Tensor:
        return F.cross_entropy(run(images), labels)

    def step() -> None:
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()

    done = len(prepared.quantized)
    return Arm(model, done, done + len(prepared.left_in_float), prepared.setup, forward, step)


def rss_of_arm(model_name: str, arm: str, threads: int) -> int:
    """Return the peak RSS of an arm's first training step; runs in a process of its own."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    built = build_arm(model_name, "eager", arm)
    return peak_rss(built.step)


def measure(model_name: str, mode: str, arms: Sequence[str], options: argparse.Namespace) -> list[Row]:
    """Measure all arms of one model and mode; an arm that cannot run is named with its reason and left out."""
    torch._dynamo.reset()
    built: dict[str, Arm] = {}
    first: dict[str, float] = {}
    for name in arms:
        try:
            built[name] = build_arm(model_name, mode, name)
            start = time.perf_counter()
            built[name].step()
        except (PeerUnavailableError, torch._dynamo.exc.TorchDynamoException) as error:
            built.pop(name, None)
            print(f"  {name}: not measured: {str(error).strip().splitlines()[0]}")
            continue
        first[name] = time.perf_counter() - start
    seconds = interleave({n: a.step for n, a in built.items()}, options.rounds, 2, options.clock)
    memory = {n: tensor_memory(a.forward, a.step) for n, a in built.items()}
    reference = memory["float"]
    with_rss = options.rss and mode == "eager"  # in the other mode it would show the compiler's memory
    return [
        Row(
            model=model_name,
            mode=mode,
            arm=name,
            layers=f"{arm.quantized}/{arm.layers}",
            ms=Spread.of(1e3 * s for s in seconds[name]),
            time_ratio=ratios(seconds, name, "float"),
            memory=memory[name],
            kept_ratio=memory[name].kept / reference.kept,
            peak_ratio=memory[name].peak / reference.peak,
            first_step_s=first[name],
            rss_bytes=_in_fresh_process(model_name, name, options.threads) if with_rss else None,
            setup=arm.setup,
        )
        for name, arm in built.items()
    ]


def _in_fresh_process(*args: Any) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(rss_of_arm, args)


def markdown(rows: Sequence[Row], threads: int, clock: str) -> str:
    """Return the table; quartiles in brackets."""
    head = ("model", "mode", "arm", "layers", "step, ms", "time / float", "kept, MiB", "kept / float", "peak / float")
    lines = ["| " + " | ".join((*head, "RSS / float")) + " |", "|---" * (len(head) + 1) + "|"]
    rss = {(r.model, r.mode): r.rss_bytes for r in rows if r.arm == "float"}
    for r in rows:
        base = rss[r.model, r.mode]
        cells = (
            *(r.model, r.mode, r.arm, r.layers),
            *(f"{r.ms.median:.0f} ({r.ms.low:.0f}-{r.ms.high:.0f})", str(r.time_ratio)),
            *(f"{r.memory.kept / 2**20:.1f}", f"{r.kept_ratio:.2f}", f"{r.peak_ratio:.2f}"),
            f"{r.rss_bytes / base:.2f}" if r.rss_bytes and base else "-",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join((*lines, "", f"{threads} thread(s), {clock} time; layers: quantized of all."))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--modes", nargs="+", choices=("eager", "compile"), default=["eager"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(DEFAULT_ARMS))
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each arm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu where others use the machine too")
    parser.add_argument("--rss", action="store_true", help="also the resident memory of each arm (eager, Linux)")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    arms = ["float", *(a for a in options.arms if a != "float")]
    rows: list[Row] = []
    for model_name in options.models:
        for mode in options.modes:
            print(f"{model_name}, {mode}, {options.threads} thread(s), {options.rounds} rounds", flush=True)
            rows += measure(model_name, mode, arms, options)
            print(table := markdown(rows, options.threads, options.clock), flush=True)
    environment = {"clock": options.clock, "torch": torch.__version__, "machine": platform.machine()}
    if options.markdown:
        options.markdown.write_text(table + "\n")
    if options.json:
        payload = {"environment": environment, "threads": options.threads, "rows": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps(payload, indent=2) + "\n")


if __name__ == "__main__":
    main()
