"""What Q2 costs: the time of a training step, and the graph and the latency of what is deployed.

Steps are taken in turn, on one batch: quantization-aware training, the same with norms and controller, with attention
alignment too, and the teacher's forward alone. Then the plain and the folded model are packed and exported, and their
operators and times in ONNX Runtime compared. Weights are random: times do not depend on them.

    python -m benchmarks.q2_cost > docs/results/q2_cost.md
"""

from __future__ import annotations

import argparse
import collections
import copy
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fewbits as fb
from benchmarks.measure import interleave, ratios
from benchmarks.q2 import TAPS, Lab
from fewbits.deploy import fold_fusion
from fewbits.deploy.verify import engine_name, latencies, open_session
from fewbits.layers import balance_fusion, in_eval, settle_fusion
from fewbits.layers.fusion_control import update_fusion
from fewbits.recipes.fusing import aligned
from fewbits.recipes.planning import make_plan
from fewbits.recipes.schema import Alignment
from fewbits.train.loop import Loss


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", default=["nuclei", "bccd", "camvid"])
    add("--rounds", type=int, default=15)
    add("--times", type=int, default=7, help="measurements of latency, of which the median is told")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    labs = {name: Lab(args, name) for name in args.tasks}
    print(f"torch {torch.__version__}, {engine_name()}, one thread; median (quartiles) of {args.rounds} rounds\n")
    print(
        "| task | batch | step of qat, s | + norms and controller | + alignment | teacher alone | alignment less it |"
    )
    print("| --- " * 7 + "|")
    for name, lab in labs.items():
        print(step_row(name, lab, args.rounds), flush=True)
    print("\n| task | operators, plain | operators, folded | ms, plain | ms, folded | ratio |\n" + "| --- " * 6 + "|")
    for name, lab in labs.items():
        print(deploy_row(name, lab, args.times), flush=True)


def quantized(lab: Lab, float_model: nn.Module, fused: bool) -> nn.Module:
    """Return a calibrated model at 4 bits, with balanced nodes or without."""
    model = copy.deepcopy(float_model)
    recipe = lab.planned("W4A4", "lsq")
    batches = [lab.task.sample(8)]
    if fused:
        balance_fusion(model, lab.task.sample(2), "auto")
        settle_fusion(model, batches)
    plan = make_plan(model, recipe, lab.task.sample(1), lab.task.sensitivity(recipe), lab.task.loss())
    return fb.calibrate(fb.quantize(model, plan, verbose=False), batches)


def step_row(name: str, lab: Lab, rounds: int) -> str:
    """Return the times of a step as cells."""
    assert lab.recipe.qat is not None
    float_model, _ = lab.task.build(lab.recipe)
    size = lab.recipe.qat.batch_size
    batch: Any = lab.task.train.gather(range(size), torch.Generator().manual_seed(0))
    taps = TAPS.get(name) or (lab.recipe.alignment and lab.recipe.alignment.taps)
    steps: dict[str, Callable[[], object]] = {}
    for arm in ("qat", "controller", "q2"):
        model, loss = quantized(lab, float_model, arm != "qat").train(), lab.task.loss()
        if arm == "q2":
            rules = Alignment(taps=taps, options={"divergence": "kl"})
            loss = aligned(loss, model, copy.deepcopy(float_model), rules)
        steps[arm] = stepper(model, loss, batch)
    teacher = copy.deepcopy(float_model).eval()

    def teach() -> None:
        with torch.no_grad():
            teacher(batch[0])

    seconds = interleave({**steps, "teacher": teach}, rounds, 2)
    plain = statistics.median(seconds["qat"])
    own = [(q - c - t) / p for q, c, t, p in zip(*(seconds[k] for k in ("q2", "controller", "teacher", "qat")))]
    told = [ratios(seconds, arm, "qat") for arm in ("controller", "q2", "teacher")]
    return f"| {name} | {size} | {plain:.2f} | {told[0]} | {told[1]} | {told[2]} | {statistics.median(own):+.3f} |"


def stepper(model: nn.Module, loss: Loss, batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
    """Return one step of training."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss(model, batch).backward()
        update_fusion(model)
        optimizer.step()

    return step


def deploy_row(name: str, lab: Lab, times: int) -> str:
    """Return operators and times of the plain and of the folded model as cells."""
    float_model, _ = lab.task.build(lab.recipe)
    x = lab.task.sample(1)
    counts, files = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in ("plain", "folded"):
            model = quantized(lab, float_model, arm == "folded")
            if arm == "folded":
                fold_fusion(model, [lab.task.sample(8)])
            with in_eval(model):
                packed = fb.pack(model, x)
            files[arm] = Path(folder) / f"{arm}.onnx"
            fb.export_onnx(packed, files[arm], x)
            counts[arm] = operators(files[arm])
        pairs = [latencies(open_session(files["folded"]), files["plain"], (x,), 1) for _ in range(times)]
    folded, plain = (statistics.median(float(pair[i] or 0) for pair in pairs) for i in (0, 1))
    ratio = statistics.quantiles([a / b for a, b in pairs if b], n=4, method="inclusive")
    same = "the same" if counts["plain"] == counts["folded"] else str(counts["folded"] - counts["plain"])
    quartiles = f"{ratio[1]:.3f} ({ratio[0]:.3f}-{ratio[2]:.3f})"
    return f"| {name} | {sum(counts['plain'].values())} | {same} | {plain:.2f} | {folded:.2f} | {quartiles} |"


def operators(file: Path) -> collections.Counter[str]:
    """Count the nodes of a graph by operator."""
    import onnx

    return collections.Counter(node.op_type for node in onnx.load(file).graph.node)


if __name__ == "__main__":
    main()
