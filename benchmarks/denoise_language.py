"""Stability of low-bit training of a small GPT: validation loss over learning rates, ours next to the baselines.

A character-level GPT on tiny Shakespeare, trained from nothing; every arm has the same data order, steps, schedule
(AdamW, betas 0.9/0.99, weight decay 0.1 off the quantizers, warm-up, cosine to a tenth, gradients clipped at 1) and
blocks. The linear layers of the blocks are quantized; embeddings, head, norms and attention products are in float.
One JSON line a finished run; finished runs are skipped, so it can be stopped and started again.

    python -m benchmarks.denoise_language --out docs/results/denoise_language.jsonl --bits A1W1
    python -m benchmarks.denoise_language --out docs/results/denoise_language.jsonl --table
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fewbits as fb
from benchmarks.figure import Panel, figure
from fewbits.cost import bops, model_shape
from fewbits.cost import size as packed_size
from fewbits.plan import LayerPlan, Plan, TensorPlan
from fewbits.quantizers import Quantizer
from fewbits.tasks.gpt import GPT, GPTConfig
from fewbits.tasks.language import block_rules, evaluate, next_token_loss
from fewbits.tasks.text import load_text
from fewbits.train.data import Batches

SIZES = {
    "tiny": GPTConfig(layers=2, heads=4, width=128, context=64),
    "small": GPTConfig(layers=4, heads=4, width=256, context=128),
}
VALIDATED = 32768  # tokens
VOCABULARY = 65  # characters of tiny Shakespeare
DIVERGED = 1.05  # of the loss at the start


def denoise(bits: int, block: int, sparsity: str | None = None, **options: Any) -> TensorPlan:
    """Return a plan of the denoising quantizer, affine unless sparse or told otherwise."""
    symmetric = options.pop("symmetric", sparsity is not None)
    return TensorPlan(
        bits, "denoise", symmetric=symmetric, granularity="block", block=block, options=options, sparsity=sparsity
    )


def at_mean(bits: int, block: int, sparsity: str | None = None, **options: Any) -> TensorPlan:
    """Return the same with the range "absmean" at one bit: a threshold at the mean, and a gain of one."""
    return denoise(bits, block, sparsity, **options, **({"range": "absmean"} if bits == 1 else {}))


def masked(bits: int, block: int, sparsity: str | None = None, **options: Any) -> TensorPlan:
    """Return the same with no gradient through the codes of what the range "absmean" clips."""
    return at_mean(bits, block, sparsity, **options, **({"clip": "mask"} if bits == 1 else {}))


def dynamic(bits: int, block: int, symmetric: bool, sparsity: str | None = None) -> TensorPlan:
    """Return a plan with the range of each block anew and a straight-through gradient."""
    return TensorPlan(bits, "dynamic", symmetric=symmetric, granularity="block", block=block, sparsity=sparsity)


def layer_plan(arm: str, a: int, w: int, block: int, sparsity: str | None = None) -> LayerPlan | None:
    """Return what an arm does with a linear layer; None for float."""
    s = sparsity
    plans = {
        "denoise": lambda: (denoise(w, block, s), denoise(a, block)),
        "denoise-linear": lambda: (denoise(w, block, s, symmetric=True), denoise(a, block, symmetric=True)),
        "denoise-mean": lambda: (at_mean(w, block, s), at_mean(a, block)),
        "denoise-mean-gain": lambda: (at_mean(w, block, s, gradient="gain"), at_mean(a, block, gradient="gain")),
        "denoise-mask": lambda: (masked(w, block, s), masked(a, block)),
        "denoise-mask-gain": lambda: (masked(w, block, s, gradient="gain"), masked(a, block, gradient="gain")),
        "lsq-denoise-mask": lambda: (
            TensorPlan(w, "lsq", granularity="block", block=block, sparsity=s),
            masked(a, block),
        ),
        "denoise-mask-inputs": lambda: (at_mean(w, block, s), masked(a, block)),
        "ste-denoise-mask": lambda: (dynamic(w, block, True, s), masked(a, block)),
        "denoise-detached": lambda: (denoise(w, block, s, detach_range=True), denoise(a, block, detach_range=True)),
        "gain-only": lambda: (denoise(w, block, s, gradient="gain"), denoise(a, block, gradient="gain")),
        "ste-ridge": lambda: (denoise(w, block, s, gradient="ste"), denoise(a, block, gradient="ste")),
        "ste-affine": lambda: (dynamic(w, block, s is not None, s), dynamic(a, block, False)),
        "ste-linear": lambda: (dynamic(w, block, True, s), dynamic(a, block, True)),
        "bitnet": lambda: (TensorPlan(w, "bitnet"), dynamic(a, block, True)),
        "paretoq": lambda: (
            TensorPlan(w, "paretoq" if w == 1 else "lsq", granularity="channel", sparsity=s),
            dynamic(a, block, True),
        ),
        "lsq": lambda: (
            TensorPlan(w, "lsq", granularity="block", block=block, sparsity=s),
            TensorPlan(a, "lsq", symmetric=a == 1),
        ),
    }
    if arm == "float":
        return None
    weight, act = plans[arm]()
    return LayerPlan(weight, act if a < 16 else None)


ARMS = (
    "float", "denoise", "denoise-mask", "denoise-mask-gain", "denoise-mean", "denoise-mean-gain", "denoise-linear",
    "denoise-mask-inputs", "gain-only", "lsq-denoise-mask", "ste-denoise-mask", "ste-ridge", "ste-affine", "ste-linear",
    "bitnet", "paretoq", "lsq",
)  # fmt: skip


def main() -> None:
    """Run what is missing, or print the table of what is there."""
    args = arguments()
    rows = read(args.out)
    alike = [row for row in rows if (row["size"], row["steps"]) == (args.size, args.steps)]
    if args.chart is not None:
        args.chart.write_text(chart(alike, args.bits), encoding="utf-8")
    if args.table or args.pareto:
        print(table(alike) if args.table else pareto(rows, args.block))
    if args.table or args.pareto or args.chart is not None:
        return
    torch.set_num_threads(args.threads)
    train, validation, vocabulary = data(args)
    for seed in args.seeds:
        for lr in args.lrs:
            for arm in args.arms:
                key = {"arm": arm, "bits": "float" if arm == "float" else args.bits, "lr": lr, "seed": seed,
                       "steps": args.steps, "size": args.size}  # fmt: skip
                if not any(all(row.get(k) == v for k, v in key.items()) for row in read(args.out)):
                    write(args.out, {**key, **run(args, arm, lr, seed, train, validation, vocabulary)})


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/denoise_language.jsonl"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=(*ARMS, "denoise-detached"))
    parser.add_argument("--bits", default="A1W1", help="like A4W1 or A4W1+2:4; A16: inputs in float")
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs")
    parser.add_argument("--chart", type=Path, help="write loss over learning rate to this SVG file")
    parser.add_argument("--pareto", action="store_true", help="print loss against bytes and bit operations")
    return parser.parse_args()


def data(args: argparse.Namespace) -> tuple[Any, Any, int]:
    """Return training and validation windows and the vocabulary."""
    context = SIZES[args.size].context
    train, validation, tokenizer = load_text("tiny_shakespeare", tokens="char", context=context)
    return train, validation.first(VALIDATED // context), tokenizer.vocabulary


def planned(size: str, bits: str, arm: str, block: int, vocabulary: int) -> tuple[nn.Module, Plan]:
    """Return a float model and the plan of an arm for it; that of ``float`` has no rules."""
    model = GPT(replace(SIZES[size], vocabulary=vocabulary))
    widths, _, sparsity = ("A16W16" if arm == "float" else bits).partition("+")
    a, w = (int(part) for part in widths[1:].split("W"))
    plan = layer_plan(arm, a, w, block, sparsity or None)
    return model, Plan(() if plan is None else tuple(block_rules(model, plan)))


def model_for(args: argparse.Namespace, arm: str, vocabulary: int, seed: int) -> nn.Module:
    """Build the quantized model of an arm, seeded."""
    torch.manual_seed(seed)
    model, plan = planned(args.size, args.bits, arm, args.block, vocabulary)
    return fb.quantize(model, plan, verbose=False) if plan.rules else model


def run(
    args: argparse.Namespace, arm: str, lr: float, seed: int, train: Any, validation: Any, vocabulary: int
) -> dict[str, Any]:
    """Train one arm once; return its validation loss, and how its gradients were."""
    start = time.perf_counter()
    model = model_for(args, arm, vocabulary, seed)
    batches, norms = Batches(train, args.batch, seed=seed), []
    first = None
    optimizer = None
    model.train()
    for step in range(args.steps):
        loss = next_token_loss(model, batches.batch(step // len(batches), step % len(batches)))
        if optimizer is None:  # after the first forward, which starts learned scales
            optimizer = torch.optim.AdamW(groups(model), lr=lr, betas=(0.9, 0.99))
            first = loss.item()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        if not math.isfinite(norms[-1]):
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * scale(step, args.steps)
        optimizer.step()
    finite = math.isfinite(norms[-1])
    result = evaluate(model, validation) if finite else {"loss": math.inf}
    assert first is not None
    return {
        "loss": result["loss"],
        "diverged": not finite or not result["loss"] < DIVERGED * first,
        "grad_median": statistics.median(norms),
        "grad_max": max(norms),
        "seconds": round(time.perf_counter() - start, 1),
    }


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return parameter groups: weight decay on matrices only, and not on what quantizers learn."""
    learned = {id(p) for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    decayed = [p for p in model.parameters() if p.ndim > 1 and id(p) not in learned]
    others = [p for p in model.parameters() if p.ndim <= 1 or id(p) in learned]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def scale(step: int, steps: int) -> float:
    """Return the learning rate's factor: linear warm-up over a tenth, then a cosine to a tenth."""
    warmup = steps // 10
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def read(path: Path) -> list[dict[str, Any]]:
    """Return the finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(path: Path, row: dict[str, Any]) -> None:
    """Append a line; several processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Return validation loss by arm and learning rate: mean and spread over seeds, and the gradient norms."""
    lrs = sorted({row["lr"] for row in rows})
    cells: dict[tuple[str, str], dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["bits"], row["arm"]][row["lr"]].append(row)
    head = " | ".join(f"{lr:g}" for lr in lrs)
    lines = [f"| bits | arm | {head} | diverged | gradient norm, median / max |", "| --- " * (len(lrs) + 4) + "|"]
    for (bits, arm), by_lr in sorted(cells.items()):
        found = [row for rows in by_lr.values() for row in rows]
        losses = " | ".join(_cell([row["loss"] for row in by_lr[lr]]) for lr in lrs)
        median = statistics.median(row["grad_median"] for row in found)
        largest = max(row["grad_max"] for row in found)
        diverged = f"{sum(row['diverged'] for row in found)} of {len(found)}"
        lines.append(f"| {bits} | {arm} | {losses} | {diverged} | {median:.2g} / {largest:.2g} |")
    return "\n".join(lines)


def chart(rows: list[dict[str, Any]], bits: str) -> str:
    """Return an SVG of the mean loss over the learning rate, a line an arm."""
    lrs = sorted({row["lr"] for row in rows})
    cells: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["bits"] in (bits, "float"):
            cells[row["arm"]][row["lr"]].append(row["loss"])
    lines = {
        arm: [(float(i), statistics.mean(cells[arm][lr])) for i, lr in enumerate(lrs) if lr in cells[arm]]
        for arm in ARMS
        if arm in cells
    }
    title = f"{bits}, validation loss in nats over learning rate"
    return figure([Panel(title, lines, labels=[f"{lr:g}" for lr in lrs])])


def pareto(rows: list[dict[str, Any]], block: int) -> str:
    """Return the loss at each arm's best learning rate, beside stored bytes and bit operations, cheapest first.

    Bytes are those of the packed file's tensors, with embeddings, norms and head in float32; bit operations are those
    of one token in the quantized layers and the head.
    """
    cells: dict[tuple[str, int, str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["size"], row["steps"], row["bits"], row["arm"]][row["lr"]].append(row["loss"])
    lines = []
    for (size, steps, bits, arm), by_lr in cells.items():
        model, plan = planned(size, bits, arm, block, VOCABULARY)
        context = SIZES[size].context
        shape = model_shape(model, torch.zeros(1, context, dtype=torch.long))
        stored, operations = packed_size(plan, shape).total, bops(plan, shape) / context
        lr = min(by_lr, key=lambda lr: statistics.mean(by_lr[lr]))
        told = f"{_cell(by_lr[lr])} | {len(by_lr[lr])} | {lr:g} | {stored / 1000:.0f} | {operations / 1e6:.2f}"
        lines.append(((size, steps), stored, f"| {size}, {steps} steps | {bits} | {arm} | {told} |"))
    head = "| model | bits | arm | loss | seeds | learning rate | kB | million bit operations a token |\n"
    return head + "| --- " * 8 + "|\n" + "\n".join(line for *_, line in sorted(lines))


def _cell(losses: list[float]) -> str:
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.3f}{spread}" if losses else ""


if __name__ == "__main__":
    main()
