"""Accuracy of short quantization-aware training on CIFAR-10: fewbits next to Brevitas, equal in everything else.

ResNet-20 starts from the public float weights, fine-tuned on the JPEG images for the same number of steps as every
arm gets. All arms share data order, steps, optimizer (SGD, momentum 0.9, weight decay 1e-4 off the quantizers, cosine)
and a learning-rate grid, from which each arm picks per width on a held-out tenth of the training set; the test set is
read once a finished run. First and last layer have 8 bits. One JSON line a finished run; finished runs are skipped, so
the benchmark can be stopped and started again.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.cifar10_qat --out docs/results/cifar10_qat.jsonl
    python -m benchmarks.cifar10_qat --out docs/results/cifar10_qat.jsonl --table
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import math
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fewbits as fb
from benchmarks.peers import ARMS, PeerUnavailableError, Widths, prepare
from fewbits.tasks.classification import cross_entropy, evaluate
from fewbits.tasks.data import shared_data_dir
from fewbits.tasks.models import build_model
from fewbits.tasks.sources import load
from fewbits.tasks.weights import load_cifar_resnet_checkpoint
from fewbits.train.data import Batches

WIDTHS = {
    "W4A4": Widths(4, 4), "W3A3": Widths(3, 3), "W2A2": Widths(2, 2), "W1A8": Widths(1, 8), "W1A4": Widths(1, 4),
    "W1A1": Widths(1, 1), "W1A8+2:4": Widths(1, 8, sparsity="2:4"),
}  # fmt: skip
QAT_ARMS = ("fewbits-lsq", "fewbits-ste", "brevitas", "brevitas-learned")  # others by --arms
FLOAT_LR = 0.01


def main() -> None:
    """Run what is missing, or print the table of what is there."""
    args = arguments()
    if args.table:
        print(table(read(args.out)))
        return
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    bench.post_training()
    for width in args.widths:
        for arm in args.arms:
            lr = bench.best_lr(arm, width)
            for seed in args.seeds:
                bench.run("qat", arm, width, seed, lr, args.steps)
    for seed in args.seeds:
        bench.run("float", "float", "float", seed, FLOAT_LR, args.steps)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/cifar10_qat.jsonl"))
    parser.add_argument("--cache", type=Path, default=Path("runs/cifar10_qat"))
    parser.add_argument("--arms", nargs="+", default=list(QAT_ARMS))
    parser.add_argument("--widths", nargs="+", default=["W4A4", "W3A3", "W2A2", "W1A8"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--grid", nargs="+", type=float, default=[0.003, 0.01, 0.03])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--grid-steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs")
    return parser.parse_args()


class Bench:
    """Data, float models and finished runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        train = load("cifar10", split="train")
        self.held_out, self.train = train.split(0.1, seed=0)
        if len(self.held_out) > len(self.train):
            self.held_out, self.train = self.train, self.held_out
        self.test = load("cifar10", split="test")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.cache.mkdir(parents=True, exist_ok=True)

    def float_model(self, seed: int) -> nn.Module:
        """Return ResNet-20 fine-tuned on the JPEG images, one a seed, kept in the cache."""
        model = build_model("resnet20", num_classes=10)
        path = self.args.cache / f"float_{seed}_{self.args.steps}x{self.args.batch}.pt"
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model
        data = shared_data_dir()
        assert data is not None, "the shared data folder is needed"
        load_cifar_resnet_checkpoint(model, data / "weights_resnet_cifar10" / "resnet20-12fca82f.th")
        before = evaluate(model, self.test)["top1"]
        self.train_model(model, seed, FLOAT_LR, self.args.steps, None)
        torch.save(model.state_dict(), path)
        self.write(stage="float start", arm="float", width="float", seed=seed, lr=FLOAT_LR, before=before,
                   top1=evaluate(model, self.test)["top1"])  # fmt: skip
        return model

    def calibration(self, seed: int) -> list[Tensor]:
        """Return the same four batches for every arm."""
        batches = Batches(self.train, 128, seed=1000 + seed)
        return [batches.batch(0, i)[0] for i in range(4)]

    def post_training(self) -> None:
        """Measure W8A8 without training."""
        for seed in self.args.seeds:
            key = {"stage": "ptq", "arm": "fewbits-ste", "width": "W8A8", "seed": seed}
            if self.done(key):
                continue
            model = self.float_model(seed)
            reference = evaluate(model, self.test)["top1"]
            plan = fb.uniform_plan(model, 8, 8, first_last=8, quantizer="ste")
            fb.calibrate(fb.quantize(model, plan, verbose=False), self.calibration(seed))
            self.write(**key, lr=0.0, float_top1=reference, top1=evaluate(model, self.test)["top1"])

    def best_lr(self, arm: str, width: str) -> float:
        """Return the learning rate with the best held-out accuracy in short runs of seed 0."""
        scores = {lr: self.run("grid", arm, width, 0, lr, self.args.grid_steps) for lr in self.args.grid}
        return max(scores, key=lambda lr: scores[lr])

    def run(self, stage: str, arm: str, width: str, seed: int, lr: float, steps: int) -> float:
        """Train one arm once, write its line, and return its accuracy (held out for "grid", else test)."""
        key = {"stage": stage, "arm": arm, "width": width, "seed": seed, "lr": lr}
        found = self.done(key)
        if found:
            return float(found["top1"])
        start = time.perf_counter()
        model = copy.deepcopy(self.float_model(seed))
        setup, groups = "", None
        if arm != "float":
            try:
                prepared = prepare(arm, model, WIDTHS[width], self.calibration(seed))
            except PeerUnavailableError as error:
                self.write(**key, steps=0, top1=float("nan"), note=str(error))
                return float("nan")
            model, setup, groups = prepared.model, prepared.setup, prepared.groups
        self.train_model(model, seed, lr, steps, groups)
        top1 = evaluate(model, self.held_out if stage == "grid" else self.test)["top1"]
        seconds = round(time.perf_counter() - start, 1)
        self.write(**key, steps=steps, batch=self.args.batch, top1=top1, seconds=seconds, setup=setup)
        return float(top1)

    def train_model(
        self, model: nn.Module, seed: int, lr: float, steps: int, groups: Any, *, first: int = 0, of: int | None = None
    ) -> None:
        """Train in a plain loop, the same for every arm: steps from number ``first`` on, of a schedule over ``of``."""
        torch.manual_seed(seed)
        decay = 1e-4
        parameters = groups(lr, decay) if groups else [{"params": list(model.parameters()), "weight_decay": decay}]
        optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
        total = of or first + steps
        cosine = lambda step: (1 + math.cos(math.pi * (first + step) / total)) / 2  # noqa: E731
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
        batches = Batches(self.train, self.args.batch, seed=seed)
        model.train()
        for step in range(first, first + steps):
            loss = cross_entropy(model, batches.batch(step // len(batches), step % len(batches)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def done(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return the line of a finished run."""
        return next((r for r in read(self.args.out) if all(r.get(k) == v for k, v in key.items())), None)

    def write(self, **row: Any) -> None:
        """Append a line."""
        write(self.args.out, **row)


def write(path: Path, **row: Any) -> None:
    """Append a line and print it; several processes may share the file."""
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Return mean and spread of the test accuracy by width and arm, in Markdown."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["stage"] in ("qat", "float", "float start", "ptq"):
            cells[row["stage"] if row["stage"] != "qat" else row["width"], row["arm"]].append(row)
    lines = ["| width | arm | top-1, mean ± sd | seeds | learning rate |", "| --- | --- | --- | --- | --- |"]
    order = ["float start", "float", "ptq", *WIDTHS]
    for (width, arm), found in sorted(cells.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        top1 = [row["top1"] for row in found]
        spread = statistics.stdev(top1) if len(top1) > 1 else float("nan")
        label = {"ptq": "W8A8, no training", "float start": "float, start of all arms", "float": "float, trained on"}
        rates = sorted({row["lr"] for row in found})
        lines.append(
            f"| {label.get(width, width)} | {arm} | {statistics.mean(top1):.2f} ± {spread:.2f} "
            f"| {', '.join(f'{t:.2f}' for t in top1)} | {rates[0]:g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    assert set(QAT_ARMS) <= set(ARMS)
    main()
