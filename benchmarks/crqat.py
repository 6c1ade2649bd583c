"""Open-vocabulary detection at 4-4-8: CR-QAT, its parts and plain training, at equal steps.

Scenes whose objects words compose (``composed_examples``): training shows the base classes with a long tail, the test
all of them, and so combinations that were never shown (novel). A float detector of the size nano is trained once and
kept in the cache; it is the teacher of every arm. Arms, all from it, on the same batches in the same order:

    ptq           ranges set, not trained
    qat           all quantized at once, the task's loss
    kd            the same with both terms of distillation
    cqat          two stages, backbone first, no distillation
    feat, text, region, full   two stages with features (PKD), and with one or both parts of the relations (TPSD)
    three, three_full   three stages, without and with distillation;  half_full  stages of equal length
    full_0.1      smooth L1 that turns linear at 0.1;  full_l3, full_l12, full_l48  other weights of the relations

One JSON line a finished run; finished runs are skipped.

    python -m benchmarks.crqat --out docs/results/crqat.jsonl
    python -m benchmarks.crqat --out docs/results/crqat.jsonl --table
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fewbits as fb
from benchmarks.cifar10_qat import read, write
from fewbits.tasks.detection_metrics import predict
from fewbits.tasks.open_vocabulary.composed import composed_examples
from fewbits.tasks.open_vocabulary.detector import OpenVocabularyDetector
from fewbits.tasks.open_vocabulary.distill import Weights, regions, task_loss, text_anchored
from fewbits.tasks.open_vocabulary.lvis_metrics import score_fixed
from fewbits.tasks.open_vocabulary.policy import policy_4_4_8
from fewbits.tasks.open_vocabulary.relations import drift, relations
from fewbits.tasks.open_vocabulary.text import ComposedText
from fewbits.tasks.open_vocabulary.vocabulary import Vocabulary
from fewbits.tasks.open_vocabulary.words import World
from fewbits.train import Batches, Curriculum, FitConfig, Stage, Staged, fit

KD = ("feat", "tpsd")
ONE, TWO, THREE = [("",)], [("backbone",), ("neck", "heads")], [("backbone",), ("neck",), ("heads",)]
THIRDS = (1 / 3, 2 / 3)
Arm = tuple[list[tuple[str, ...]], tuple[float, ...], list[tuple[str, ...]], Weights]
ARMS: dict[str, Arm] = {  # modules of the stages, their shares, their terms, weights of the terms
    "qat": (ONE, (1.0,), [()], Weights()),
    "kd": (ONE, (1.0,), [KD], Weights()),
    "cqat": (TWO, THIRDS, [(), ()], Weights()),
    "feat": (TWO, THIRDS, [("feat",), ("feat",)], Weights()),
    "text": (TWO, THIRDS, [("feat",), ("feat", "region-text")], Weights()),
    "region": (TWO, THIRDS, [("feat",), ("feat", "region-region")], Weights()),
    "full": (TWO, THIRDS, [("feat",), KD], Weights()),
    "three": (THREE, (1 / 3, 1 / 3, 1 / 3), [(), (), ()], Weights()),
    "three_full": (THREE, (1 / 3, 1 / 3, 1 / 3), [("feat",), KD, KD], Weights()),
    "half_full": (TWO, (0.5, 0.5), [("feat",), KD], Weights()),
    "full_0.1": (TWO, THIRDS, [("feat",), KD], Weights(beta=0.1)),
    "full_l3": (TWO, THIRDS, [("feat",), KD], Weights(relations=3)),
    "full_l12": (TWO, THIRDS, [("feat",), KD], Weights(relations=12)),
    "full_l48": (TWO, THIRDS, [("feat",), KD], Weights(relations=48)),
}
NAMES = ("ptq", *ARMS)
GROUPS = ("base", "novel", "frequent", "common", "rare")
SETTING = ("bits", "steps", "lr", "batch", "side", "float_steps")  # what rows of one table have in common


class Lab:
    """The world, its images, the float detector."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.world = args, World()
        encoder = ComposedText(args.width)
        self.train = composed_examples(self.world, "train", args.scenes, size=args.side)
        self.test = composed_examples(self.world, "test", args.test_scenes, size=args.side)
        self.base = Vocabulary.of(encoder, self.train.classes)
        self.all = Vocabulary.of(encoder, self.test.classes)
        self.float = self.float_model()
        self.told = self.judged(self.float)

    def float_model(self) -> OpenVocabularyDetector:
        """Return the float detector, trained once and kept in the cache."""
        args, path = self.args, self.args.cache / f"float_{self.args.side}_{self.args.width}_{self.args.float_steps}.pt"
        torch.manual_seed(0)
        model = OpenVocabularyDetector("nano", self.base)
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model.eval()
        path.parent.mkdir(parents=True, exist_ok=True)
        config = FitConfig(max_steps=args.float_steps, lr=2e-3, weight_decay=0.05, optimizer="adamw", clip=10.0,
                           warmup_steps=50)  # fmt: skip
        done = fit(model, Batches(self.train, 16), task_loss, config)
        torch.save(model.state_dict(), path)
        print(f"float: {done.seconds:.0f} s, {self.judged(model)}", flush=True)
        return model.eval()

    def compare(self, arm: str, bits: tuple[int, int, int], seed: int) -> None:
        """Do one run, unless it is done."""
        args = self.args
        key = {"arm": arm, "bits": "-".join(map(str, bits)), "seed": seed, "steps": args.steps, "lr": args.lr,
               "batch": args.batch, "side": args.side, "float_steps": args.float_steps}  # fmt: skip
        if any(all(row.get(k) == v for k, v in key.items()) for row in read(args.out)):
            return
        torch.manual_seed(seed)
        teacher = copy.deepcopy(self.float).requires_grad_(False).eval()
        model = fb.quantize(copy.deepcopy(self.float), policy_4_4_8(self.float, *bits), verbose=False)
        start = time.perf_counter()
        self.fit(model, teacher, arm, seed)
        seconds = (time.perf_counter() - start) / args.steps
        write(args.out, **key, seconds_a_step=round(seconds, 4), float=self.told, **self.judged(model, teacher))

    def fit(self, model: nn.Module, teacher: OpenVocabularyDetector, arm: str, seed: int) -> None:
        """Train an arm, or set its ranges."""
        args = self.args
        images = [x for x, _ in self.train.subset(args.calibration).batches(32)]
        if arm == "ptq":
            fb.calibrate(model, images)
            return
        modules, shares, terms, weights = ARMS[arm]
        stages = [Stage(m, s, t) for m, s, t in zip(modules, shares, terms)]
        assert isinstance(model, OpenVocabularyDetector)
        staged = Staged(Curriculum(stages), images, text_anchored(model, teacher, weights))
        if len(stages) == 1:
            fb.calibrate(model, images)
        config = FitConfig(max_steps=args.steps, lr=args.lr, weight_decay=0.05, optimizer="adamw", schedule="constant",
                           quantizer_lr=0.1, decay_all=False, clip=10.0, seed=seed, progress=False)  # fmt: skip
        fit(model, Batches(self.train, args.batch, seed=seed), task_loss, config, stages=staged)

    def judged(self, model: nn.Module, teacher: nn.Module | None = None) -> dict[str, Any]:
        """Return AP by group, and how far relations have moved from the teacher's."""
        assert isinstance(model, OpenVocabularyDetector)
        model.eval()
        model.set_vocabulary(self.all)
        outputs = (outputs for outputs, _ in predict(model, self.test, 32))
        scored = score_fixed(outputs, self.test, self.world.groups)
        result = {"ap": scored["map"], **{name: scored["groups"][name] for name in GROUPS}}
        if teacher is not None:
            assert isinstance(teacher, OpenVocabularyDetector)
            teacher.set_vocabulary(self.all)
            with torch.no_grad():
                pairs = [r for x, y in self.test.subset(min(128, len(self.test))).batches(32)
                         for r in relations(regions(model, x), regions(teacher, x), y)]  # fmt: skip
            result["drift"] = vars(drift(pairs))
        model.set_vocabulary(self.base)
        return result


def table(rows: list[dict[str, Any]]) -> str:
    """Return AP by arm and group, mean and spread over seeds, and the drift of relations; a table for each setting."""
    lines = []
    for setting in dict.fromkeys(tuple(row[name] for name in SETTING) for row in rows):
        some = [row for row in rows if tuple(row[name] for name in SETTING) == setting]
        title = f"{setting[0]}: " + ", ".join(f"{name} {value:g}" for name, value in zip(SETTING[1:], setting[1:]))
        lines += [f"\n### {title}\n", "| arm | seeds | AP | " + " | ".join(GROUPS) + " | MAE of relations | s a step |"]
        lines += ["| --- " * (len(GROUPS) + 5) + "|"]
        told = some[0]["float"]
        lines.append(f"| float | | {told['ap']:.1f} | " + " | ".join(f"{told[g]:.1f}" for g in GROUPS) + " | | |")
        for arm in NAMES:
            own = [row for row in some if row["arm"] == arm]
            if own:
                cells = [spread([row[name] for row in own]) for name in ("ap", *GROUPS)]
                cells.append(spread([row["drift"]["embedding_error"] for row in own], 3))
                cells.append(spread([row["seconds_a_step"] for row in own], 2))
                lines.append(f"| {arm} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int = 1) -> str:
    """Write mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("docs/results/crqat.jsonl"))
    add("--cache", type=Path, default=Path("runs/crqat"))
    add("--arms", nargs="+", default=list(NAMES), choices=list(NAMES))
    add("--bits", nargs="+", default=["4-4-8"], help="of weights, activations and attention")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=300)
    add("--batch", type=int, default=16)
    add("--lr", type=float, default=3e-4)
    add("--float-steps", type=int, default=3000)
    add("--scenes", type=int, default=4000)
    add("--test-scenes", type=int, default=400)
    add("--calibration", type=int, default=256)
    add("--side", type=int, default=128)
    add("--width", type=int, default=64, help="of the texts' embeddings")
    add("--threads", type=int, default=1)
    add("--table", action="store_true", help="print the table of the finished runs")
    args = parser.parse_args()
    if args.table:
        print(table(read(args.out)))
        return
    torch.set_num_threads(args.threads)
    lab = Lab(args)
    for bits in args.bits:
        weight, act, attention = (int(part) for part in bits.split("-"))
        for seed in args.seeds:
            for arm in args.arms:
                lab.compare(arm, (weight, act, attention), seed)


if __name__ == "__main__":
    main()
