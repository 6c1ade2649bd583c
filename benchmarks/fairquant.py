"""Who pays for few bits: FairQuant beside uniform widths, trained and not, with every group's accuracy.

A float model is trained once a data set and seed. Arms at a mean of B bits a weight (all weights, first and last layer
too), per channel with ``maxabs``, inputs of 8 bits:

    uniform_ptq   B bits everywhere (2.5: 2 and 3 in turn), ranges set, not trained
    uniform_qat   the same, trained;  uniform_fair  trained with the fairness term
    static        widths by importance for groups, not trained;  quantile  by the release's histogram,
                  over weights so that it has a budget
    fair_qat      static, trained;  fair  trained with the term
    blind         as fair_qat, by importance over all examples as one group
    sigma_qat     widths of layers by SigmaQuant's allocation, read from its plan file, trained
    baq           widths trained too, from static, with the term;  baq_fast  by 0.1 bits a step, not 0.02
    baq_v1, baq_head   as the method's two releases have it, whose widths get no gradient of the task

All trained arms get the same steps, batches (each group at its share), optimizer and rate. One JSON line a finished
run; finished runs are skipped.

    python -m benchmarks.fairquant --out docs/results/fairquant.jsonl
    python -m benchmarks.fairquant --out docs/results/fairquant.jsonl --table
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fewbits as fb
from benchmarks.cifar10_qat import read, write
from benchmarks.fairquant_table import table
from benchmarks.measure import interleave, ratios
from fewbits.allocate import Importance, group_importance
from fewbits.cost import model_shape, size
from fewbits.layers import quantized_layers, settle_bits
from fewbits.layers.base import QuantizedLayer
from fewbits.losses import GroupFairness
from fewbits.plan import LayerPlan, Plan
from fewbits.quantizers import ReleasedBits
from fewbits.recipes.fairly import WithGroups, fair_loss
from fewbits.tasks.classification import cross_entropy, predict
from fewbits.tasks.data import LabelledImages
from fewbits.tasks.group_metrics import group_changes, group_metrics
from fewbits.tasks.models import build_model
from fewbits.tasks.sources import load
from fewbits.train import Batches, FairnessRamp, FitConfig, Hook, LearnBits, fit

SGD: dict[str, Any] = {"lr": 0.05, "weight_decay": 5e-4}
ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.05, "optimizer": "adamw", "clip": 1.0}
HALF = {"share": 0.5}  # of the test images are the minority's: more of them to measure on
DATA: dict[str, dict[str, Any]] = {  # test: options of the test images beside; side, patch: what a transformer is told
    "digits_groups": {
        "options": {"strength": 0.8}, "test": HALF, "side": 8, "patch": 4, "epochs": {"small": 30, "deit_tiny": 20},
    },
    "cifar10_groups": {
        "options": {"strength": 0.6}, "test": HALF, "side": 32, "patch": 16,
        "epochs": {"resnet18": 10, "mobilenet": 10},
    },
    "isic2017": {
        "options": {"group": "sex"}, "side": 64, "patch": 32, "epochs": {"resnet18": 15, "deit_tiny": 20},
    },
    "nih_cxr64": {
        "options": {"group": "view"}, "side": 64, "patch": 32, "epochs": {"resnet18": 20, "deit_tiny": 30},
    },
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("reference_cnn", SGD),
    "resnet18": ("torchvision:resnet18", ADAMW),
    "mobilenet": ("torchvision:mobilenet_v3_small", ADAMW),
    "deit_tiny": ("timm:deit_tiny_patch16_224", ADAMW | {"lr": 5e-4}),
}
MENU = (2, 3, 4, 5, 6, 7, 8)
TRAINED = (
    "uniform_qat",
    "uniform_fair",
    "sigma_qat",
    "fair_qat",
    "fair",
    "blind",
    "baq",
    "baq_fast",
    "baq_v1",
    "baq_head",
)
WITH_TERM = ("uniform_fair", "fair", "baq", "baq_fast")
BITS_A_STEP = {"baq": 0.02, "baq_fast": 0.1}
ARMS = ("uniform_ptq", "static", "quantile", *TRAINED)


LEARNED: dict[str, tuple[str, dict[str, Any]]] = {
    "baq": ("learnable_bits", {}),
    "baq_fast": ("learnable_bits", {}),
    "baq_v1": ("released_bits", {"release": "v1"}),
    "baq_head": ("released_bits", {"release": "head"}),
}


def learned(plan: Plan, quantizer: str, options: dict[str, Any]) -> Plan:
    """Return the plan with weights whose widths, from those of the plan on, are learned."""
    rules: list[tuple[str, LayerPlan | None]] = []
    for name, layer in plan:
        if layer is not None and layer.weight is not None:
            layer = replace(layer, weight=replace(layer.weight, quantizer=quantizer, options=options))
        rules.append((name, layer))
    return Plan(tuple(rules))


def alternating(plan: Plan, model: nn.Module, bits: float) -> Plan:
    """Return a uniform plan; at 2.5 bits every other channel of each layer has 2, the others 3."""
    if bits == int(bits):
        return plan
    rules: list[tuple[str, LayerPlan | None]] = []
    for name, layer in plan.resolve(model_shape(model).names).items():
        if layer is not None and layer.weight is not None:
            steps = [math.floor(i * bits) for i in range(len(model.get_submodule(name).weight) + 1)]
            mixed = tuple(b - a for a, b in itertools.pairwise(steps))
            layer = replace(layer, weight=replace(layer.weight, channel_bits=mixed))
        rules.append((name, layer))
    return Plan(tuple(rules))


class Lab:
    """One data set, one model, one seed: data, float model, importance."""

    def __init__(self, args: argparse.Namespace, data: str, model: str, seed: int) -> None:
        self.args, self.data, self.model, self.seed, self.given = args, data, model, seed, DATA[data]
        self.measured: dict[bool, tuple[Importance, float]] = {}
        options = self.given["options"]
        self.train = load(data, None, "train", **options)
        self.test = load(data, None, "test", **options | self.given.get("test", {}))
        assert self.train.groups is not None and self.test.groups is not None
        self.names, self.groups, self.test_groups = self.train.group_names, self.train.groups, self.test.groups
        self.float = self.float_model()
        self.before = predict(self.float, self.test).argmax(1)

    def build(self) -> nn.Module:
        """Return the architecture."""
        sized = {"img_size": self.given["side"], "patch_size": self.given["patch"]} if self.model == "deit_tiny" else {}
        return build_model(MODELS[self.model][0], len(self.train.classes), self.train.shape[0], **sized)

    def float_model(self) -> nn.Module:
        """Return the float model, trained once and kept in the cache."""
        torch.manual_seed(self.seed)
        model, self.kept = self.build(), self.args.cache / f"{self.data}_{self.model}_{self.seed}.pt"
        if self.kept.exists():
            model.load_state_dict(torch.load(self.kept, weights_only=True))
            return model.eval()
        epochs = self.given["epochs"][self.model]
        config = FitConfig(epochs=epochs, warmup_steps=20, seed=self.seed, progress=False, **MODELS[self.model][1])
        done = fit(model, Batches(self.train, 64, seed=self.seed), cross_entropy, config)
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        self.kept.with_suffix(".seconds").write_text(str(done.seconds / epochs))
        torch.save(model.state_dict(), self.kept)
        return model.eval()

    def importance(self, blind: bool) -> Importance:
        """Return the importance of each group's examples, or of as many of all; measured once."""
        if blind not in self.measured:
            start = time.perf_counter()
            self.measured[blind] = self._importance(blind), time.perf_counter() - start
        return self.measured[blind][0]

    def _importance(self, blind: bool) -> Importance:
        members = (
            [self.train]
            if blind
            else [self.train.select((self.groups == i).nonzero()[:, 0]) for i in range(len(self.names))]
        )
        names = ["all"] if blind else self.names
        count = self.args.group_examples * (len(self.names) if blind else 1)
        parts = {n: some.subset(min(count, len(some)), self.seed).batches(32) for n, some in zip(names, members)}
        return group_importance(self.float, parts, cross_entropy)

    def plan(self, arm: str, bits: float) -> Plan:
        """Return the plan of an arm."""
        style: dict[str, Any] = {"first_last": None, "act_bits": 8, "act_quantizer": "lsq"}
        if arm.startswith("uniform"):
            return alternating(
                fb.uniform_plan(self.float, math.ceil(bits), quantizer="maxabs", **style), self.float, bits
            )
        if arm == "sigma_qat":
            file = self.args.cache / f"sigma_{self.data}_{self.model}_{self.seed}_{bits:g}.json"
            fb.allocate(self.float, fb.Budget(average_bits=bits), method="sigma", menu=MENU, quantizer="maxabs",
                        **style).save(file)  # fmt: skip
            return Plan.load(file)
        more: dict[str, Any] = {}
        if arm == "quantile":  # the release's histogram, from all at 2 bits to 20, 40, 40 % at 2, 4, 8
            part = (bits - 2.0) / 3.2
            more = {"rule": "wquantile", "shares": (1 - 0.8 * part, 0, 0.4 * part, 0, 0, 0, 0.4 * part)}
        budget = fb.Budget(average_bits=bits + 0.1 * (arm == "quantile"))  # it meets its mean but for a channel
        importance = self.importance(arm == "blind")
        plan = fb.allocate(
            self.float, budget, method="fair", menu=MENU, quantizer="maxabs", importance=importance, **style, **more
        )
        return learned(plan, *LEARNED[arm]) if arm in LEARNED else plan

    def compare(self, arm: str, bits: float) -> None:
        """Do one run, unless it is done."""
        args = self.args
        key = {"data": self.data, "model": self.model, "arm": arm, "bits": bits, "seed": self.seed,
               "steps": args.steps, "lr": args.lr, "batch": args.batch}  # fmt: skip
        if any(all(row.get(k) == v for k, v in key.items()) for row in read(args.out)):
            return
        if not arm.startswith("uniform") and bits in (MENU[0], MENU[-1]):
            return  # at the ends of the menu there is nothing to choose
        start, plan = time.perf_counter(), self.plan(arm, bits)
        planned, model = time.perf_counter() - start, self.quantized(plan)
        seconds = self.fit(model, arm, bits, args.steps) if arm in TRAINED else 0.0
        if arm.startswith("baq"):
            plan = settle_bits(model)
        if False in self.measured:
            key["seconds_importance"] = round(self.measured[False][1], 2)
            key["seconds_float_epoch"] = float(self.kept.with_suffix(".seconds").read_text())
        write(args.out, **key, seconds_plan=round(planned, 2), seconds_a_step=round(seconds / args.steps, 4),
              **self.judged(model.eval(), plan))  # fmt: skip

    def cost(self, rounds: int = 9) -> tuple[str, str]:
        """Return the time of the importance over that of an epoch in float, and of a step of baq over a fixed one."""
        steps: dict[str, Callable[[], object]] = {
            "epoch": lambda: fit(self.build(), Batches(self.train, 32), cross_entropy, FitConfig(epochs=1)),
            "importance": lambda: self._importance(False),
        }
        whole = interleave(steps, 3, 0)
        few, steps = 4, {}
        for arm in ("uniform_fair", "baq"):
            steps[arm] = partial(self.fit, self.quantized(self.plan(arm, 4.0)), arm, 4.0, few)
        return str(ratios(whole, "importance", "epoch")), str(
            ratios(interleave(steps, rounds, 1), "baq", "uniform_fair")
        )

    def quantized(self, plan: Plan) -> nn.Module:
        """Return the float model quantized and its ranges set."""
        model = self.build()
        model.load_state_dict(self.float.state_dict())
        calibration = [x for x, _ in self.train.subset(min(256, len(self.train)), self.seed).batches(128)]
        return fb.calibrate(fb.quantize(model, plan, verbose=False), calibration)

    def fit(self, model: nn.Module, arm: str, bits: float, steps: int) -> float:
        """Train an arm; return its seconds."""
        args, hooks = self.args, list[Hook]()
        loss: Any = lambda net, batch: cross_entropy(net, batch[:2])  # noqa: E731
        if arm in WITH_TERM:
            fairness = GroupFairness(self.names, args.mode, least=4)
            loss, hooks = fair_loss(fairness, 0.0), [FairnessRamp(fairness)]
        if arm in BITS_A_STEP:
            hooks.append(LearnBits(bits, lr=BITS_A_STEP[arm]))
        if arm in ("baq_v1", "baq_head"):
            plain, released = loss, [q for q in model.modules() if isinstance(q, ReleasedBits)]
            loss = lambda net, batch: plain(net, batch) + sum(q.penalty() for q in released)  # noqa: E731
        config = FitConfig(max_steps=steps, lr=args.lr, weight_decay=0.01, optimizer="adamw", clip=1.0,
                           seed=self.seed, progress=False)  # fmt: skip
        return fit(
            model, Batches(WithGroups(self.train), args.batch, seed=self.seed), loss, config, hooks=hooks
        ).seconds

    def judged(self, model: nn.Module, plan: Plan) -> dict[str, Any]:
        """Return metrics of the whole, of each group, and of what was lost; and the bits."""
        test: LabelledImages = self.test
        answers = predict(model, test).argmax(1)
        right = [answer == test.labels for answer in (self.before, answers)]
        forms = [group_metrics(a, test.labels, self.test_groups, len(test.classes), self.names)
                 for a in (self.before, answers)]  # fmt: skip
        changes = group_changes(right[0], right[1], self.test_groups, self.names)
        cost = size(plan, model_shape(self.float, self.test.gather([0])[0]))
        channels = [b for layer in quantized_layers(model).values() for b in widths(layer)]
        return {"average_bits": cost.average_weight_bits, "channel_bits": statistics.mean(channels),
                "bytes": cost.total, "float": forms[0], "metrics": forms[1], "changes": changes}  # fmt: skip


def widths(layer: QuantizedLayer) -> Sequence[int]:
    """Return the width of each output channel of a layer; attention has no weight of its own."""
    plan = layer.layer_plan.weight
    return () if plan is None else plan.channel_bits or (plan.bits,) * len(getattr(layer, layer.weight_name))


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("docs/results/fairquant.jsonl"))
    add("--cache", type=Path, default=Path("runs/fairquant"))
    add("--data", nargs="+", default=list(DATA), choices=list(DATA))
    add("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    add("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    add("--bits", nargs="+", type=float, default=[2, 2.5, 3, 4, 5, 8])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=60)
    add("--batch", type=int, default=64)
    add("--lr", type=float, default=1e-3)
    add("--mode", default="gap_sg", help="of the fairness term")
    add("--group-examples", type=int, default=256)
    add("--threads", type=int, default=1)
    add("--table", action="store_true", help="print the table of the finished runs")
    add("--cost", action="store_true", help="print what learned widths and the importance cost in time")
    args = parser.parse_args()
    if args.table:
        print(table(read(args.out), {arm: "uniform_qat" if arm in TRAINED else "uniform_ptq" for arm in ARMS}))
        return
    torch.set_num_threads(args.threads)
    if args.cost:
        print("| data | model | importance, part of an epoch | step of baq / of uniform_fair |\n" + "| --- " * 4 + "|")
    for data in args.data:
        for model in args.models:
            for seed in args.seeds:
                if model in DATA[data]["epochs"]:
                    lab = Lab(args, data, model, seed)
                    if args.cost:
                        print(f"| {data} | {model} | {' | '.join(lab.cost())} |", flush=True)
                        continue
                    for bits in args.bits:
                        for arm in args.arms:
                            lab.compare(arm, bits)


if __name__ == "__main__":
    main()
