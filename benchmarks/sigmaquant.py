"""Accuracy against size on CIFAR-10: SigmaQuant's search beside other ways to choose bits per layer, equal in the rest.

ResNet-20 and ResNet-56 start from the public float weights, fine-tuned on the JPEG images once a seed. A budget is a
share of the INT8 weight size: mean bits of all weights of convolutions and linear layers, codes alone. Every arm picks
from the same menu, with 8-bit inputs and 8 bits in the first and the last layer, and gets the same number of training
steps with the same quantizer, optimizer, learning rate and data: an arm that only plans gets them as one cosine
schedule; what ``sigma`` and ``sigma_fisher`` train in their search counts, and the model that they find gets what is
left. A search sees part of a held-out tenth of the training set, the test set is read once a finished run.

One JSON line a finished run; finished runs are skipped, and runs that would repeat another's bits take over its result.

    python -m benchmarks.sigmaquant --out docs/results/sigmaquant.jsonl
    python -m benchmarks.sigmaquant --out docs/results/sigmaquant.jsonl --table --chart docs/results/sigmaquant.svg
    python -m benchmarks.sigmaquant --export-mct            # then benchmarks/peers/mct.py, then --arms mct
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fewbits as fb
from benchmarks.accuracy_size import chart, table
from benchmarks.cifar10_qat import FLOAT_LR, Bench, read
from fewbits.allocate import Problem, Style, plan_costs
from fewbits.cost import model_shape
from fewbits.errors import BudgetError
from fewbits.tasks.classification import cross_entropy, evaluate
from fewbits.tasks.data import shared_data_dir
from fewbits.tasks.models import build_model
from fewbits.tasks.weights import load_cifar_resnet_checkpoint
from fewbits.train.data import Batches
from fewbits.train.optim import parameter_groups

WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
PLANNED: dict[str, dict[str, Any]] = {  # arms that plan, then train once: options of fewbits.allocate
    "uniform": {"method": "uniform"},
    "random": {"method": "random"},
    "reversed_sigma": {"method": "reversed_sigma"},
    "sigma_order": {"method": "sigma_order"},
    "mse": {"method": "solver", "sensitivity": "mse"},
    "hessian": {"method": "solver", "sensitivity": "hessian"},
    "fisher": {"method": "solver", "sensitivity": "fisher"},
    "measured": {"method": "solver", "sensitivity": "measured"},
    "sigma_plain": {"method": "sigma", "kl": "plain"},
    "sigma_untrained": {"method": "sigma"},
}
UNTRAINED = {"epochs_reference": 0, "epochs_cluster": 0, "epochs_refine": 0, "patience": 10}
# the search on calibrated models; our hybrid with moves by Fisher information; the paper's, which trains each step
SEARCHED = ("sigma", "sigma_fisher", "sigma_trained")
ARMS = (*PLANNED, *SEARCHED, "mct")
DEFAULT_ARMS = tuple(arm for arm in ARMS if arm != "mct")


class Lab(Bench):
    """Data, float models and finished runs of one architecture."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        super().__init__(args)
        self.name, self.plans = name, dict[tuple[Any, ...], fb.Plan]()
        if args.train_images:
            self.train = self.train.subset(args.train_images, seed=0)
        self.judged = self.held_out.subset(min(args.search_images, len(self.held_out)), seed=1)

    def float_model(self, seed: int) -> nn.Module:
        """Return the architecture fine-tuned on the JPEG images, one a seed, kept in the cache."""
        args, model = self.args, build_model(self.name, num_classes=10)
        kept = args.cache / f"{self.name}_{seed}_{args.float_steps}x{args.batch}_{args.train_images}.pt"
        if kept.exists():
            model.load_state_dict(torch.load(kept, weights_only=True))
            return model
        data = shared_data_dir()
        if data is None:
            raise SystemExit("the folder with weights_resnet_cifar10 is needed: see fewbits.tasks.data.shared_data_dir")
        load_cifar_resnet_checkpoint(model, data / "weights_resnet_cifar10" / WEIGHTS[self.name])
        self.train_model(model, seed, FLOAT_LR, args.float_steps, None)
        torch.save(model.state_dict(), kept)
        if self.done({"model": self.name, "arm": "float", "seed": seed}) is None:
            self.write(model=self.name, arm="float", seed=seed, top1=evaluate(model, self.test)["top1"],
                       held_out=evaluate(model, self.held_out)["top1"])  # fmt: skip
        return model

    def key(self, arm: str, percent: float, seed: int) -> dict[str, Any]:
        """Return what tells a run from the others."""
        args = self.args
        return {"model": self.name, "arm": arm, "percent": percent, "seed": seed, "steps": args.steps, "lr": args.lr,
                "batch": args.batch, "quantizer": args.quantizer, "menu": args.menu,
                "train_images": args.train_images}  # fmt: skip

    def compare(self, arm: str, percent: float, seed: int) -> None:
        """Do one run, unless it is done: plan, train, measure, write the line."""
        key = self.key(arm, percent, seed)
        if self.done(key) is not None:
            return
        try:
            made = self.search(arm, percent, seed) if arm in SEARCHED else self.plan_once(arm, percent, seed)
        except FileNotFoundError as error:  # no result: the run stays open
            print(f"{arm} at {percent:g} % left out: {error}", flush=True)
            return
        except (BudgetError, LookupError) as error:
            self.write(**key, top1=None, note=str(error))
            return
        plan, model, spent, told = made
        bits = {name: layer.weight.bits for name, layer in plan if layer is not None and layer.weight is not None}
        costs = plan_costs(plan, model_shape(self.float_model(seed)))
        told |= {"bits": bits, "average_bits": costs["average_bits"], "size_bytes": costs["size_bytes"]}
        same = self.done({k: v for k, v in key.items() if k not in ("arm", "percent")} | {"bits": bits, "spent": spent})
        if same is not None and spent == 0:
            found = {name: same[name] for name in ("top1", "held_out", "seconds_train")}
            self.write(**key, **told, spent=0, same_as=same["arm"], **found)
            return
        start = time.perf_counter()
        self.train_model(model, seed, self.args.lr, self.args.steps - spent, self.groups(model), first=spent)
        seconds = round(time.perf_counter() - start, 1)
        self.write(**key, **told, spent=spent, seconds_train=seconds, held_out=evaluate(model, self.held_out)["top1"],
                   top1=evaluate(model, self.test)["top1"])  # fmt: skip

    def plan_once(self, arm: str, percent: float, seed: int) -> tuple[fb.Plan, nn.Module, int, dict[str, Any]]:
        """Return (plan, calibrated model, steps spent, what to write) of an arm that trains only afterwards."""
        model, start = self.float_model(seed), time.perf_counter()
        if arm == "mct":
            plan, seconds = self.mct_plan(model, percent, seed)
        else:
            plan = self.allocated(model, arm, percent, seed)
            seconds = round(time.perf_counter() - start, 1)
        fb.calibrate(fb.quantize(model, plan, verbose=False), self.calibration(seed))
        return plan, model, 0, {"seconds_plan": seconds}

    def allocated(self, model: nn.Module, arm: str, percent: float, seed: int) -> fb.Plan:
        """Return the plan of ``fewbits.allocate``, with what the method needs of data."""
        options, style = dict(PLANNED[arm]), self.style()
        if arm == "random":
            options["seed"] = seed
        if options.get("sensitivity", "mse") != "mse":
            options |= self.judging(seed)
        return fb.allocate(model, fb.Budget(average_bits=0.08 * percent), menu=self.args.menu, **style, **options)

    def mct_plan(self, model: nn.Module, percent: float, seed: int) -> tuple[fb.Plan, float]:
        """Return the bit map that ``benchmarks/peers/mct.py`` left, as a plan in our style, and its seconds."""
        path = self.args.cache / "mct" / f"{self.name}_{seed}_{percent:g}.json"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: --export-mct, then run benchmarks/peers/mct.py")
        found = json.loads(path.read_text())
        if "error" in found:
            raise LookupError(f"MCT {found['version']}: {found['error']}")
        budget = fb.Budget(average_bits=0.08 * percent)
        problem = Problem(model, model_shape(model), budget, tuple(self.args.menu), Style(**self.style()))
        return problem.plan(found["bits"], "mct"), found["seconds"]

    def judging(self, seed: int) -> dict[str, Any]:
        """Return the loss and the training batches that a sensitivity is measured with."""
        batches = Batches(self.train, 64, seed=2000 + seed)
        return {"loss": cross_entropy, "batches": [batches.batch(0, i) for i in range(self.args.batches)]}

    def search(self, arm: str, percent: float, seed: int) -> tuple[fb.Plan, nn.Module, int, dict[str, Any]]:
        """Run ``sigma_search``.

        The floor is the INT8 model's accuracy, which makes the search spend its whole size; the buffer of the size is
        a thousandth of INT8, which makes a point above the budget count as far off. What ``sigma_trained`` trains in
        its search counts into the total; the others only set ranges and statistics of batch norms anew at each step.
        """
        from fewbits.allocate.sigma import sigma_search

        args, model, start = self.args, self.float_model(seed), time.perf_counter()
        counted = Counted(self, seed, args.epoch_steps, args.steps)
        settings: dict[str, Any] = dict(UNTRAINED)
        if arm == "sigma_trained":
            moves = counted.moves(args.rounds, args.phase_epochs, args.final_share)
            phase = args.phase_epochs
            settings = {"rounds": args.rounds, "epochs_reference": phase, "epochs_cluster": phase, "epochs_refine": 1,
                        "evaluate_every": phase, "steps": moves}  # fmt: skip
        settings |= {"move": args.move or max(2, len(model_shape(model).layers) // 5), "cost_buffer": 0.001,
                     "seed": seed} | dict(args.sigma or ())  # fmt: skip
        result = sigma_search(
            model,
            fb.Budget(average_bits=0.08 * percent, accuracy_drop=0.0),
            counted.finetune,
            lambda given: float(evaluate(given, self.judged)["top1"]),
            self.calibration(seed)[: args.search_batches],
            menu=args.menu,
            style=Style(**self.style()),
            **(self.judging(seed) if arm == "sigma_fisher" else {}),
            **settings,
        )
        seconds = round(time.perf_counter() - start, 1)
        told = {"seconds_plan": seconds, "status": result.status, "missed": result.missed}
        told["searched"] = [
            {k: step[k] for k in ("phase", "accuracy", "costs", "region")} for step in result.log["steps"]
        ]
        return result.plan, result.model, counted.done, told

    def style(self) -> dict[str, Any]:
        """Return what all plans have in common."""
        return {"act_bits": 8, "first_last": 8, "quantizer": self.args.quantizer}

    def groups(self, model: nn.Module) -> Callable[[float, float], list[dict[str, Any]]]:
        """Return the parameter groups of fewbits: no weight decay on what quantizers learn."""
        return lambda lr, decay: parameter_groups(model, lr, decay)

    def export_mct(self, percents: list[float], seed: int) -> Path:
        """Write the float model, its calibration batches and the budgets in bytes, for ``benchmarks/peers/mct.py``."""
        model = self.float_model(seed)
        shape = model_shape(model)
        weighted = [layer.name for layer in shape.layers if layer.weight_shape]
        path = self.args.cache / "mct" / f"{self.name}_{seed}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        given = {"model": self.name, "state": model.state_dict(), "batches": self.calibration(seed),
                 "menu": self.args.menu, "ends": [weighted[0], weighted[-1]],
                 "budgets": {f"{p:g}": p / 100 * shape.numel for p in percents}}  # fmt: skip
        torch.save(given, path)
        return path


class Counted:
    """The ``finetune`` of a search: ``epoch_steps`` steps an epoch on fresh batches, and never more than ``total``."""

    def __init__(self, lab: Lab, seed: int, epoch_steps: int, total: int) -> None:
        self.lab, self.seed, self.epoch_steps, self.total, self.done = lab, seed, epoch_steps, total, 0

    def finetune(self, model: nn.Module, epochs: int) -> None:
        """Train for so many epochs, which go on in the one cosine schedule over the total."""
        steps = min(epochs * self.epoch_steps, self.total - self.done)
        if steps:
            lab = self.lab
            lab.train_model(model, self.seed, lab.args.lr, steps, lab.groups(model), first=self.done, of=self.total)
        self.done += steps

    def moves(self, rounds: int, phase_epochs: int, final_share: float) -> int:
        """Return for how many steps of phase 2 there is training left, with a share of the total kept for the end."""
        left = (1 - final_share) * self.total - (1 + rounds) * phase_epochs * self.epoch_steps
        return max(0, int(left // self.epoch_steps))


def main() -> None:
    """Run what is missing, or print the table of what is there."""
    args = arguments()
    if args.table or args.chart:
        rows = read(args.out)
        if args.chart:
            args.chart.write_text(chart(rows, args.models), encoding="utf-8")
        print(table(rows, args.models))
        return
    torch.set_num_threads(args.threads)
    for name in args.models:
        lab = Lab(args, name)
        for seed in args.seeds:
            if args.export_mct:
                print(lab.export_mct(args.budgets, seed))
                continue
            for percent in args.budgets:
                for arm in args.arms:
                    lab.compare(arm, percent, seed)
            for bits in args.line:  # where the uniform line has its points
                lab.compare("uniform", uniform_percent(lab.float_model(seed), bits), seed)


def uniform_percent(model: nn.Module, bits: int) -> float:
    """Return the size, in percent of INT8, of the model at ``bits`` everywhere but in the two ends."""
    costs = plan_costs(fb.uniform_plan(model, bits, first_last=8), model_shape(model))
    return float(round(costs["average_bits"] / 0.08 + 5e-4, 3))


def setting(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE of a search's setting; the value is JSON, or else text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("docs/results/sigmaquant.jsonl"))
    add("--cache", type=Path, default=Path("runs/sigmaquant"))
    add("--models", nargs="+", default=list(WEIGHTS), choices=list(WEIGHTS))
    add("--arms", nargs="+", default=list(DEFAULT_ARMS), choices=list(ARMS))
    add("--budgets", nargs="+", type=float, default=[20, 30, 40, 60], help="percent of the INT8 weight size")
    add("--line", nargs="*", type=int, default=[1, 2, 3, 4, 6], help="widths of the uniform line")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--menu", nargs="+", type=int, default=[1, 2, 3, 4, 6, 8])
    add("--quantizer", default="lsq")
    add("--lr", type=float, default=0.01)
    add("--steps", type=int, default=160, help="of training a run, all of a search included")
    add("--float-steps", type=int, default=100, help="of the float model on the JPEG images")
    add("--batch", type=int, default=64)
    add("--train-images", type=int, default=0, help="of the training set; 0: all but the held-out tenth")
    add("--batches", type=int, default=4, help="of 64 images, for a sensitivity that needs data")
    add("--search-images", type=int, default=512, help="held-out images that a search measures on")
    add("--search-batches", type=int, default=1, help="of 128 images, on which each step of a search calibrates")
    add("--epoch-steps", type=int, default=4, help="steps that sigma_trained calls an epoch")
    add("--phase-epochs", type=int, default=2, help="of its INT8 reference and of each of its rounds")
    add("--rounds", type=int, default=1, help="of phase 1 of sigma_trained")
    add("--final-share", type=float, default=0.4, help="of the steps, kept for after the search of sigma_trained")
    add("--move", type=int, default=0, help="layers a step of phase 2; 0: a fifth of all, at least 2")
    add("--sigma", nargs="*", type=setting, help="further settings of the search, NAME=VALUE")
    add("--threads", type=int, default=1)
    add("--table", action="store_true", help="print the table of the finished runs")
    add("--chart", type=Path, help="write accuracy against size of all arms to this SVG file")
    add("--export-mct", action="store_true", help="write what benchmarks/peers/mct.py needs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
