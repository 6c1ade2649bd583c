"""Q2 on real images: what balanced fusion and attention alignment add to quantization-aware training.

A float model is trained once a task by its recipe (``--float`` trains those that are missing) and is the start and the
teacher of every arm. Each arm is trained for the same steps on the same batches with the same optimizer and rate,
measured ``--points`` times on the way on the images that are not trained on, folded, and measured again.

    qat           quantization-aware training alone
    ln            + norms behind the fusion nodes, gains equal (the paper never separates this from the next)
    controller    + gains by the controller
    q2            + attention alignment (KL)
    ada           attention alignment alone
    ada_strong, q2_strong   ada and q2 with the weight at which the alignment's gradient is RATIO of the task's
    q2_fixed      q2_strong, constant norms for the last FIXED of the steps
    gains         gains by the controller, without norms
    fixed2, fixed4, fixed8  + norms, the shallow branch times so much
    learned       + norms, gains trained by the loss (version 1 of the paper)
    watched       as qat, its gradient energies measured
    float         the float model trained on, energies measured, and float_controller the same with balanced nodes

One JSON line a finished run; finished runs are skipped.

    python -m benchmarks.q2 --float
    python -m benchmarks.q2 --out docs/results/q2.jsonl
    python -m benchmarks.q2 --out docs/results/q2.jsonl --table
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fewbits as fb
from benchmarks.cifar10_qat import read, write
from fewbits.deploy import fix_fusion, fold_and_measure
from fewbits.layers import FusionSettings, balance_fusion, fusion_nodes, settle_fusion
from fewbits.layers.settle import reestimate_batch_norms
from fewbits.recipes.fusing import aligned, alignment_weight
from fewbits.recipes.planning import make_plan
from fewbits.recipes.read import find
from fewbits.recipes.read import read as read_recipe
from fewbits.recipes.runner import run
from fewbits.recipes.schema import Alignment, Recipe
from fewbits.recipes.tasks import load_task
from fewbits.train import BalanceFusion, Batches, FitConfig, Hook, fit

RECIPES = {
    "nuclei": "segmentation_nuclei_q2",
    "bccd": "detection_bccd_q2",
    "scenes": "segmentation_scenes_q2",
    "camvid": "benchmarks/segmentation_camvid.yaml",
}
TAPS = {"camvid": ["up.1", "up.2"]}  # where the recipe itself has none
METRIC = {"nuclei": "dice", "camvid": "miou", "bccd": "map", "scenes": "miou"}
NORM = FusionSettings(mode="fixed")
WATCHED = FusionSettings(mode="off", norm=False)  # the plain operator
FUSIONS: dict[str, FusionSettings | None] = {
    "qat": None, "ada": None, "ln": NORM, "controller": FusionSettings(), "q2": FusionSettings(),
    "ada_strong": None, "q2_strong": FusionSettings(), "q2_fixed": FusionSettings(), "ln_fixed": NORM,
    "gains": FusionSettings(norm=False),
    "learned": FusionSettings(mode="learned"), "watched": WATCHED, "float": WATCHED,
    "float_controller": FusionSettings(),
    **{f"fixed{k}": FusionSettings(mode="fixed", gains=(1, k)) for k in (2, 4, 8)},  # deep, shallow
}  # fmt: skip
ALIGNED = ("q2", "ada", "q2_strong", "ada_strong", "q2_fixed")
FIXED = 0.5
RATIO = 0.2  # at the tapped features, on the first batch
WIDTHS = {"W4A4": (4, 4), "W3A3": (3, 3), "W2A4": (2, 4)}
BASES: dict[str, dict[str, Any]] = {
    "lsq": {"quantizer": "lsq", "act_quantizer": "lsq"},
    "pact": {"quantizer": "lsq", "act_quantizer": "pact"},
    "denoise": {"quantizer": "lsq", "act_quantizer": "denoise"},
    "lsq_tensor": {
        "quantizer": "lsq",
        "act_quantizer": "lsq",
        "granularity": "tensor",
        "range": "minmax",
    },  # a weak one
}


class Lab:
    """Data, recipe and float model of one task."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        self.args, self.name = args, name
        given = RECIPES[name]
        self.recipe = read_recipe(Path(given) if given.endswith(".yaml") else find(given))
        self.task = load_task(self.recipe)
        self.weights = Path(getattr(args, "cache", "runs/q2")) / name / "steps" / "float.pt"

    def train_float(self) -> None:
        """Train the float model by its recipe, unless that is done; the rest of the run is cut short."""
        if self.weights.exists():
            return
        changes = {"fusion": None, "alignment": None, "qat": None, "export": None}
        run(self.recipe.model_copy(update=changes), self.args.cache / self.name, replace=True)

    def float_model(self) -> nn.Module:
        """Return the float model. Raises SystemExit where it is not trained."""
        if not self.weights.exists():
            raise SystemExit(f"{self.weights} is missing: run with --float first")
        model, _ = self.task.build(self.recipe)
        model.load_state_dict(torch.load(self.weights, weights_only=True))
        return model

    def prepared(self, fusion: FusionSettings | None) -> nn.Module:
        """Return the float model, trained on for ``--prepare`` steps: as it is, or with norms behind its nodes.

        Norms change the function, and take steps to get used to; these are the same for all arms, and kept.
        """
        norms, model = fusion is not None and fusion.norm, self.float_model()
        kind = "norms" if norms else "plain"
        kept = self.args.cache / self.name / f"prepared_{kind}_{self.args.prepare}x{self.args.batch}.pt"
        if not kept.exists():
            self.prepare(kept, norms)
        if fusion is not None:
            balance_fusion(model, self.task.sample(2), "auto", fusion)
        model.load_state_dict(torch.load(kept, weights_only=True), strict=False)  # gains are those of the arm
        if (
            fusion not in (None, WATCHED) and not norms
        ):  # equal gains are a factor, which the batch norms have yet to know of
            reestimate_batch_norms(model, self.task.calibration(self.recipe))
        return model.eval()

    def prepare(self, file: Path, norms: bool) -> None:
        """Train the float model on, and keep its weights."""
        args, model = self.args, self.float_model()
        if norms:
            balance_fusion(model, self.task.sample(2), "auto", NORM)
            settle_fusion(model, self.task.calibration(self.recipe))
        if args.prepare:
            config = FitConfig(max_steps=args.prepare, lr=args.lr, weight_decay=0.0, optimizer="adamw", clip=self.clip,
                               progress=False)  # fmt: skip
            fit(model, Batches(self.task.train, args.batch, seed=0), self.task.loss(), config)
        torch.save({name: v for name, v in model.state_dict().items() if "fusions." not in name}, file)

    @property
    def clip(self) -> float | None:
        """Where gradients are clipped."""
        return None if self.recipe.qat is None else self.recipe.qat.clip

    def planned(self, width: str, base: str) -> Recipe:
        """Return the recipe with these bits and quantizers."""
        weight, inputs = WIDTHS[width]
        plan = {"weight_bits": weight, "act_bits": inputs, **BASES[base]}
        return self.recipe.model_copy(update={"plan": self.recipe.plan.model_copy(update=plan)})

    def score(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics on the images that are not trained on."""
        found = self.task.evaluate(model, self.task.test, self.recipe.evaluate.batch_size)
        return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}

    def compare(self, arm: str, width: str, base: str, seed: int) -> None:
        """Do one run, unless it is done."""
        args = self.args
        key = {"task": self.name, "arm": arm, "width": width, "base": base, "seed": seed, "steps": args.steps,
               "lr": args.lr, "batch": args.batch, "prepare": args.prepare}  # fmt: skip
        if any(all(row.get(k) == v for k, v in key.items()) for row in read(args.out)):
            return
        batches, fusion = self.task.calibration(self.recipe), FUSIONS[arm]
        model, teacher = self.prepared(fusion), self.float_model()
        if not arm.startswith("float"):
            recipe = self.planned(width, base)
            plan = make_plan(model, recipe, self.task.sample(1), self.task.sensitivity(recipe), self.task.loss())
            fb.calibrate(fb.quantize(model, plan, verbose=False), batches)
        start = self.score(model)
        told = self.train(model, teacher, arm, seed)
        if fusion is not None:
            report = fold_and_measure(model, batches, self.score)
            told |= {"constant": dict(report.constant_norm), "folded": dict(report.folded)}
            told["kept"] = [name for name, way in report.nodes.items() if way.startswith("kept")]
        write(args.out, **key, start=start, **told)

    def train(self, model: nn.Module, teacher: nn.Module, arm: str, seed: int) -> dict[str, Any]:
        """Train one arm; return its metrics with the norms as trained, and what was seen on the way."""
        args, given = self.args, self.recipe.qat
        assert given is not None
        loss = self.task.loss(given.label_smoothing)
        if arm in ALIGNED:
            taps = TAPS.get(self.name) or (self.recipe.alignment and self.recipe.alignment.taps)
            ratio = RATIO if arm in ("q2_strong", "ada_strong", "q2_fixed") else None
            rules = Alignment(taps=taps, options={"divergence": "kl"}, ratio=ratio)
            if ratio is not None:
                batch = self.task.train.gather(range(args.batch))
                weight = alignment_weight(self.task.loss(), model, teacher, rules, batch)
                rules = rules.model_copy(update={"options": {**rules.options, "weight": weight}})
            loss = aligned(loss, model, teacher, rules)
        watch = Watch(self, max(1, args.steps // args.points))
        hooks: list[Hook] = [watch]
        if arm.endswith("_fixed"):
            batches = self.task.calibration(self.recipe)
            hooks.append(BalanceFusion(fix=functools.partial(fix_fusion, batches=batches), fix_at=1 - FIXED))
        elif fusion_nodes(model):
            hooks.append(BalanceFusion())
        config = FitConfig(max_steps=args.steps, lr=args.lr, weight_decay=0.0, optimizer="adamw", clip=self.clip,
                           seed=seed, progress=False)  # fmt: skip
        batches = Batches(self.task.train, args.batch, seed=seed)
        done = fit(model, batches, loss, config, hooks=hooks)
        return {"curve": watch.curve, "log_ratios": watch.ratios, "gains": gains(model), "end": self.score(model),
                "seconds_a_step": round((done.seconds - watch.seconds) / args.steps, 4)}  # fmt: skip


class Watch(Hook):
    """Measures the model every so many steps, and notes the log ratios of its nodes; its seconds do not count."""

    def __init__(self, lab: Lab, every: int) -> None:
        self.lab, self.every, self.seconds = lab, every, 0.0
        self.curve: list[list[float]] = []
        self.ratios: dict[str, list[float]] = {}

    def after_step(self, state: Any) -> None:
        """See ``Hook``."""
        if state.step % self.every:
            return
        start = time.perf_counter()
        state.model.eval()
        with torch.no_grad():
            value = self.lab.score(state.model)[METRIC[self.lab.name]]
        state.model.train()
        self.curve.append([state.step, value])
        for name, node in fusion_nodes(state.model).items():
            self.ratios.setdefault(name, []).append(round(node.log_ratio(), 4))
        self.seconds += time.perf_counter() - start


def gains(model: nn.Module) -> dict[str, list[float]]:
    """Return the gains of each node."""
    return {name: [round(float(g), 4) for g in node.gains] for name, node in fusion_nodes(model).items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Return a line for each task, width, base, rate and arm, of means and deviations over seeds.

    The metric before training, after it, and deployed; its gain over plain training, in pairs; the share of the steps
    after which plain training's best is reached; the time of a step; the largest log ratio of a node in the end.
    """
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[row["task"], row["width"], row["base"], row["lr"], row["arm"]].append(row)
    titles = ("task", "width", "base", "lr", "arm", "seeds", "before", "trained", "deployed", "against qat",
              "steps to its best", "step time", "log ratio")  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    order = list(FUSIONS)
    for (*place, arm), found in sorted(cells.items(), key=lambda c: (*c[0][:-1], order.index(c[0][-1]))):
        metric, plain = METRIC[place[0]], {r["seed"]: r for r in cells.get((*place, "qat"), [])}
        pairs = [(row, plain[row["seed"]]) for row in found if row["seed"] in plain]
        gain = [final(row, metric) - final(other, metric) for row, other in pairs]
        slower = [row["seconds_a_step"] / other["seconds_a_step"] for row, other in pairs]
        reached = [first_step(row, max(v for _, v in other["curve"])) / row["steps"] for row, other in pairs]
        ratio = [max(abs(values[-1]) for values in row["log_ratios"].values()) for row in found if row["log_ratios"]]
        told = [*map(str, place), arm, str(len(found))]
        told += [spread([r["start"][metric] for r in found]), spread([r["end"][metric] for r in found])]
        told += [spread([final(r, metric) for r in found]), "" if arm == "qat" else spread(gain, sign="+")]
        told += [spread(reached), spread(slower), spread(ratio)]
        lines.append("| " + " | ".join(told) + " |")
    return "\n".join(lines)


def final(row: dict[str, Any], metric: str) -> float:
    """Return the metric of what is deployed."""
    return float(row.get("folded", row["end"])[metric])


def first_step(row: dict[str, Any], goal: float) -> float:
    """Return the first measured step at or above the goal; infinite where none is."""
    return next((step for step, value in row["curve"] if value >= goal), float("inf"))


def spread(values: list[float], sign: str = "") -> str:
    """Write mean and standard deviation."""
    if not values:
        return ""
    if max(values) == float("inf"):
        return f"not in {sum(v == float('inf') for v in values)} of {len(values)}"
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation}"


def main() -> None:
    """Train float models, run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("docs/results/q2.jsonl"))
    add("--cache", type=Path, default=Path("runs/q2"))
    add("--tasks", nargs="+", default=["nuclei", "bccd", "camvid"], choices=list(RECIPES))
    add(
        "--arms",
        nargs="+",
        default=["qat", "ln", "controller", "q2", "ada", "gains", "fixed2", "fixed4", "fixed8", "learned"],
    )
    add("--widths", nargs="+", default=list(WIDTHS))
    add("--bases", nargs="+", default=["lsq", "pact"], choices=list(BASES))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=120)
    add("--batch", type=int, default=8)
    add("--prepare", type=int, default=300, help="float steps before, with norms where the arm has them")
    add("--points", type=int, default=6, help="measurements on the way")
    add("--lr", type=float, default=1e-3)
    add("--threads", type=int, default=1)
    add("--float", action="store_true", help="train the float models that are missing, and nothing else")
    add("--table", action="store_true", help="print the table of the finished runs")
    args = parser.parse_args()
    if args.table:
        print(table(read(args.out)))
        return
    torch.set_num_threads(args.threads)
    for name in args.tasks:
        lab = Lab(args, name)
        if args.float:
            lab.train_float()
            continue
        for width in args.widths:
            for base in args.bases:
                for seed in args.seeds:
                    for arm in args.arms:
                        lab.compare(arm, width, base, seed)


if __name__ == "__main__":
    main()
