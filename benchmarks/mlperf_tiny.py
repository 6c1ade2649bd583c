"""The MLPerf Tiny reference models under 64 kB and 96 kB: what each allocation leaves of their accuracy.

The float TFLite files of the reference (github mlcommons/tiny, Apache-2.0; anomaly detection MIT) become PyTorch
modules, with every weight as in the file, get a plan with 8-bit inputs within so many bytes (codes, scales and
biases), and are measured:

* image classification (ResNet-8): top-1 on the CIFAR-10 test images, calibrated only and after ``--steps`` of training;
* visual wake words (MobileNet 0.25): top-1 on the COCO images that are here (a person covers over 0.5 %), no training;
* keyword spotting (DS-CNN; its weights are int8 in the file) and anomaly detection (autoencoder): there is no data, so
  only the error of the output on random inputs can be told.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.mlperf_tiny --out docs/results/mlperf_tiny.jsonl [--table]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fewbits as fb
from benchmarks.cifar10_qat import read, write
from benchmarks.tflite_float import TfliteNet
from fewbits.allocate import plan_costs
from fewbits.cost import model_shape
from fewbits.errors import BudgetError
from fewbits.tasks.classification import cross_entropy
from fewbits.tasks.data import LabelledImages, shared_data_dir
from fewbits.tasks.sources import load
from fewbits.train.data import Batches
from fewbits.train.optim import parameter_groups

METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"method": "uniform"},
    "mse": {"method": "solver"},
    "fisher": {"method": "solver", "sensitivity": "fisher"},
    "sigma_untrained": {"method": "sigma"},
}
FILES = {
    "image_classification": "pretrainedResnet.tflite",
    "visual_wake_words": "vww_96_float.tflite",
    "keyword_spotting": "kws_ref_model_float32.tflite",
    "anomaly_detection": "ad01_fp32.tflite",
}
PERSON_SHARE = 0.005  # of the image, from which on it counts as one with a person


class Raw(nn.Module):
    """A net that wants pixels of 0..255, fed with normalized images."""

    def __init__(self, net: nn.Module, images: LabelledImages) -> None:
        super().__init__()
        self.net = net
        for name, values in (("mean", images.mean), ("spread", images.std)):
            self.register_buffer(name, 255 * torch.tensor(values, dtype=torch.float32)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, 3, H, W], normalized."""
        out: Tensor = self.net(x * self.spread + self.mean)
        return out


@dataclass
class Case:
    """One model: an example, calibration batches, and labelled data where there is any."""

    model: nn.Module
    calibration: list[Tensor]
    test: list[tuple[Tensor, Tensor]]
    train: LabelledImages | None = None


def cases(names: Sequence[str], folder: Path) -> dict[str, Case]:
    """Return the models that were asked for, with what data there is."""
    makers = {"image_classification": _cifar, "visual_wake_words": _coco}
    found = {}
    for name in names:
        net = TfliteNet(folder / "weights_mlperf_tiny" / name / FILES[name], logits=True).eval()
        found[name] = makers.get(name, _noise)(net, name, folder)
    return found


def _cifar(net: nn.Module, name: str, folder: Path) -> Case:
    train, test = load("cifar10", split="train"), load("cifar10", split="test")
    batches = Batches(train, 128, seed=1000)
    return Case(Raw(net, train).eval(), [batches.batch(0, i)[0] for i in range(4)], list(test.batches(250)), train)


def _coco(net: nn.Module, name: str, folder: Path) -> Case:
    import numpy as np
    from PIL import Image

    images, labels = [], []
    for path in sorted((folder / "coco_small" / "images").rglob("*.jpg")):
        boxes = folder / "coco_small" / "object_detection" / "labels" / path.parent.name / f"{path.stem}.txt"
        rows = [list(map(float, line.split())) for line in boxes.read_text().splitlines()] if boxes.exists() else []
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((96, 96), Image.Resampling.BILINEAR), dtype=np.float32)
        images.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255)
        labels.append(int(any(row[0] == 0 and row[3] * row[4] > PERSON_SHARE for row in rows)))
    return Case(net, [torch.stack(images)], [(torch.stack(images), torch.tensor(labels))])


def _noise(net: nn.Module, name: str, folder: Path) -> Case:
    shape = (1, 49, 10) if name == "keyword_spotting" else (640,)
    return Case(net, [torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))], [])


def run(case: Case, budget: int, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Allocate, calibrate, measure, and train where there is data for it."""
    start, options, model = time.perf_counter(), dict(METHODS[method]), copy.deepcopy(case.model)
    if options.get("sensitivity") == "fisher":
        if case.train is None:
            return {"note": "fisher needs labelled training data, and there is none"}
        batches = Batches(case.train, 64, seed=2000)
        options |= {"loss": cross_entropy, "batches": [batches.batch(0, i) for i in range(4)]}
    try:
        plan = fb.allocate(model, fb.Budget(size_bytes=budget), example=case.calibration[0][:1], menu=args.menu,
                           act_bits=8, first_last=args.first_last, **options)  # fmt: skip
    except BudgetError as error:
        return {"note": str(error)}
    seconds = round(time.perf_counter() - start, 2)
    costs = plan_costs(plan, model_shape(model, case.calibration[0][:1]))
    fb.calibrate(fb.quantize(model, plan, verbose=False), case.calibration)
    row = {
        "seconds_plan": seconds,
        "size_bytes": costs["size_bytes"],
        "average_bits": costs["average_bits"],
        "bits": {n: layer.weight.bits for n, layer in plan if layer is not None and layer.weight is not None},
        **measured(model, case),
    }
    if case.train is not None and args.steps:
        trained = (trained_once(model, case.train, args, seed) for seed in args.seeds)
        row["top1_trained"] = [measured(each, case)["top1"] for each in trained]
    return row


@torch.no_grad()
def measured(model: nn.Module, case: Case) -> dict[str, float]:
    """Return top-1 and agreement with the float model where there are labels; else the output's SQNR on noise."""
    model.eval()
    if not case.test:
        before, after = case.model(case.calibration[0]), model(case.calibration[0])
        noise = (after - before).double().square().sum().clamp_min(1e-30)
        return {"noise_sqnr_db": float(10 * (before.double().square().sum() / noise).log10())}
    right = same = total = 0
    for x, labels in case.test:
        answers = model(x).argmax(1)
        right, total = right + int((answers == labels).sum()), total + len(x)
        same += int((answers == case.model(x).argmax(1)).sum())
    return {"top1": 100 * right / total, "agreement": 100 * same / total, "images": total}


def trained_once(model: nn.Module, images: LabelledImages, args: argparse.Namespace, seed: int) -> nn.Module:
    """Return a copy trained by Adam: norms are folded in the files, and SGD would need a rate of its own a layer."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(parameter_groups(model, args.lr, 0.0))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    batches = Batches(images, 64, seed=seed)
    model.train()
    for step in range(args.steps):
        loss = cross_entropy(model, batches.batch(step // len(batches), step % len(batches)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the finished runs in Markdown."""
    lines = ["| model | budget | method | size | bits a weight | accuracy | after training |", "| --- " * 7 + "|"]
    for row in rows:
        if "note" in row:
            shown = ["", "", row["note"], ""]
        elif row["method"] == "float":
            shown = [f"{row['size_bytes'] / 1000:.1f} kB", "32", _shown(row), ""]
        else:
            trained = _mean(row["top1_trained"]) if "top1_trained" in row else ""
            shown = [f"{row['size_bytes'] / 1000:.1f} kB", f"{row['average_bits']:.2f}", _shown(row), trained]
        budget = f"{row['budget'] / 1000:g} kB" if row["budget"] else ""
        lines.append(f"| {row['model']} | {budget} | {row['method']} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} %"


def _shown(row: dict[str, Any]) -> str:
    if "top1" in row:
        return f"{row['top1']:.2f} % of {row['images']}, as float on {row['agreement']:.1f} %"
    return f"no data; output SQNR on noise {row['noise_sqnr_db']:.1f} dB" if "noise_sqnr_db" in row else "no data"


def main() -> None:
    """Run what is missing, or print the table of what is there."""
    args = arguments()
    if args.table:
        print(table(read(args.out)))
        return
    torch.set_num_threads(args.threads)
    folder = args.data or shared_data_dir()
    if folder is None:
        raise SystemExit("give --data, the folder that holds weights_mlperf_tiny and coco_small")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, case in cases(args.models, folder).items():
        jobs = [(None, "float"), *itertools.product((1000 * kb for kb in args.budgets), args.methods)]
        for budget, method in jobs:
            key = {"model": name, "budget": budget, "method": method, "steps": args.steps if case.train else 0}
            if any(all(row.get(k) == v for k, v in key.items()) for row in read(args.out)):
                continue
            if budget is None:
                size = 4 * sum(p.numel() for p in case.model.parameters())
                write(args.out, **key, size_bytes=size, **(measured(case.model, case) if case.test else {}))
            else:
                write(args.out, **key, **run(case, budget, method, args))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("docs/results/mlperf_tiny.jsonl"))
    add("--data", type=Path, help="folder of the weights and of the COCO images")
    add("--models", nargs="+", default=list(FILES), choices=list(FILES))
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    add("--budgets", nargs="+", type=int, default=[64, 96], help="in thousands of bytes")
    add("--menu", nargs="+", type=int, default=[1, 2, 3, 4, 6, 8])
    add("--first-last", type=int, default=None, help="least bits of the two ends; the autoencoder's hold most weights")
    add("--steps", type=int, default=200, help="of training, for image classification")
    add("--lr", type=float, default=2e-5)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of that training")
    add("--threads", type=int, default=1)
    add("--table", action="store_true", help="print the table of the finished runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
