from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbits as fb
from fewbits.cost import Hardware, bit_prices, hardware_cost, model_shape
from fewbits.deploy import code_mismatches
from fewbits.errors import HardwareError, TrainingError
from fewbits.layers import settle_bits
from fewbits.plan import LayerPlan, Plan, TensorPlan
from fewbits.quantizers import MaxAbs
from fewbits.train import Batches, FitConfig, Hook, LearnBits, fit
from fewbits.train.bits import learnable, unit_sizes


class Data:
    def __init__(self) -> None:
        self.x = torch.randn(64, 6)
        self.y = (self.x @ torch.randn(6, 3)).argmax(1)

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, indices: Sequence[int], generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return self.x[chosen], self.y[chosen]


def model(start: int = 5, **options: Any) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    weight = TensorPlan(start, "learnable_bits", granularity="channel", options=options)
    fb.quantize(net, Plan((("*", LayerPlan(weight)),)), verbose=False)
    return net


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def train(net: nn.Module, data: Data, hook: LearnBits, steps: int = 60, **more: Any) -> None:
    config = FitConfig(max_steps=steps, lr=0.05, progress=False, log_every=1, checkpoint_every=10, clip=1.0)
    fit(net, Batches(data, 16), loss, config, hooks=[hook, *more.pop("hooks", [])], **more)


def spent(net: nn.Module) -> float:
    widths = torch.cat([q.width.detach() for q in learnable(net).values()])
    sizes = torch.cat(unit_sizes(net))
    return float((widths * sizes).sum() / sizes.sum())


class Trace(Hook):
    """Notes the real average, and the widths, after each step."""

    def __init__(self, hook: LearnBits) -> None:
        self.hook, self.averages, self.widths = hook, list[float](), list[Tensor]()

    def after_step(self, state: Any) -> None:
        self.averages.append(self.hook.average())
        self.widths.append(torch.cat([q.width.detach().clone() for q in self.hook.quantizers]))


@pytest.mark.parametrize("mode", ["ste", "frac"])
def test_widths_meet_the_budget_then_are_whole_and_stay(mode: str) -> None:
    net, hook = model(start=4, mode=mode), LearnBits(4.0, freeze_at=0.75, lr=0.05)
    trace = Trace(hook)
    train(net, Data(), hook, steps=200, hooks=[trace])
    assert abs(trace.averages[149] - 4.0) < 0.05, "at the end of the first phase"
    assert spent(net) <= 4.0 + 1e-6 and spent(net) > 3.8
    final = trace.widths[150]
    assert torch.equal(final, final.round()) and all(torch.equal(w, final) for w in trace.widths[150:])
    assert len(set(final.tolist())) > 1, "the loss tells channels apart"
    assert all(q.frozen for q in learnable(net).values())


def test_the_task_moves_the_widths() -> None:
    net, data = model(), Data()
    loss(net, data.gather(range(16))).backward()
    assert all(bool((q.width.grad != 0).any()) for q in learnable(net).values() if q.width.grad is not None)
    assert all(q.width.grad is not None for q in learnable(net).values())


def test_the_trainers_optimizer_leaves_widths_alone() -> None:
    net = model(start=4)
    hook = LearnBits(4.0, lr=1e-9)
    train(net, Data(), hook, steps=5)
    torch.testing.assert_close(torch.cat([q.width.detach() for q in learnable(net).values()]), torch.full((19,), 4.0))


def test_a_resumed_run_ends_bit_equal(tmp_path: Path) -> None:
    data, whole = Data(), model()
    cut = copy.deepcopy(whole)
    train(whole, data, LearnBits(3.5), out=tmp_path / "whole")

    class Stop(Hook):
        def after_step(self, state: Any) -> None:
            if state.step == 45:  # behind the freeze, between two checkpoints
                raise KeyboardInterrupt

    first = copy.deepcopy(cut)
    with pytest.raises(KeyboardInterrupt):
        train(first, data, LearnBits(3.5), out=tmp_path / "cut", hooks=[Stop()])

    class Go(Hook):
        pass

    Go.__name__ = "Stop"  # the same run
    train(cut, data, LearnBits(3.5), out=tmp_path / "cut", hooks=[Go()], resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters()))
    with pytest.raises(TrainingError, match=r"'average_bits': 3\.5.* this has .*3\.0"):
        train(copy.deepcopy(first), data, LearnBits(3.0), out=tmp_path / "cut", hooks=[Go()], resume=True)


def test_settled_layers_answer_alike_and_are_packed(tmp_path: Path) -> None:
    net = model()
    train(net, Data(), LearnBits(3.5))
    x = torch.randn(5, 6)
    before = net.eval()(x)
    plan = settle_bits(net)
    assert torch.equal(net(x), before)
    assert all(type(layer.weight_quantizer) is MaxAbs for layer in (net[0], net[2]))
    packed = fb.pack(net)
    assert torch.equal(packed(x), before) and code_mismatches(net, packed) == 0
    fb.save(packed, tmp_path / "m.safetensors")
    plain = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    assert torch.equal(fb.load(tmp_path / "m.safetensors", plain)(x), before)
    assert dict(plan)["0"].weight.quantizer == "maxabs"  # type: ignore[union-attr]


def test_prices_make_it_a_budget_of_another_cost() -> None:
    net = model()
    assert [float(s.sum()) for s in unit_sizes(net)] == [96, 48]
    assert [float(s.sum()) for s in unit_sizes(net, {"0": 10.0, "2": 90.0})] == pytest.approx([10, 90])
    hook = LearnBits(4.0, prices={"0": 1.0, "2": 99.0}, lr=0.1)
    train(net, Data(), hook, steps=150)
    first, last = (float(q.width.detach().mean()) for q in learnable(net).values())
    assert last <= 4.01 and first > last, "the cheap layer's bits hardly count"


@pytest.mark.parametrize("hardware", ["shift_add", "npu"])
def test_an_energy_is_a_line_in_the_widths_and_is_met(hardware: str) -> None:
    net, data = model(), Data()
    shape, described = model_shape(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), data.x[:1]), None
    described = Hardware.load(hardware)
    if hardware == "shift_add":
        engine = described.engine.model_copy(update={"cycles_from": "linear"})
        described = described.model_copy(update={"engine": engine})
    weight = TensorPlan(5, "learnable_bits", granularity="channel")
    plan = Plan((("*", LayerPlan(weight, TensorPlan(8, "lsq", symmetric=False))),))
    found = bit_prices(net, plan, shape, described, learnable(net), 2, 8)
    for bits in (2, 5, 8):
        flat = Plan((("*", LayerPlan(TensorPlan(bits, "maxabs", granularity="channel"), plan.rules[0][1].input)),))
        cost = hardware_cost(flat, shape, described)
        whole = cost.compute_energy + cost.memory_energy
        exact = hardware == "shift_add" or bits in (2, 8)
        assert not exact or found.energy({"0": bits, "2": bits}) == pytest.approx(whole, rel=1e-9)
    memory = described.memory.model_copy(update={"sram_pj": 0.0, "dram_pj": 0.0})
    flat_rate = described.model_copy(update={"memory": memory, "engine": Hardware.load("int8_mac").engine})
    with pytest.raises(HardwareError, match="does not grow with the bits"):
        bit_prices(net, plan, shape, flat_rate, learnable(net))
    target = found.energy({"0": 4.0, "2": 4.0})
    assert found.mean_bits(target) == pytest.approx(4.0)
    train(net, data, LearnBits(found.mean_bits(target), prices=found.prices, lr=0.1))
    means = {name: float(q.width.detach().mean()) for name, q in learnable(net).items()}
    assert target - 0.2 * target < found.energy(means) <= target * (1 + 1e-9)


@pytest.mark.parametrize(
    ("net", "options", "words"),
    [
        (lambda: nn.Linear(2, 2), {}, "no learnable widths"),
        (model, {"average_bits": 1.5}, "below the least of the learnable widths, 2"),
        (model, {"prices": {"0": 1.0}}, "none for layer '2'"),
    ],
)
def test_what_cannot_be_learned_is_told(net: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        train(net(), Data(), LearnBits(**{"average_bits": 4.0, **options}), steps=1)
    with pytest.raises(TrainingError, match="above 0"):
        LearnBits(4.0, lr=0.0)
