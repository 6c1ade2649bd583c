"""The law decode(encode(x)) == forward(x), for every quantizer, width, granularity, sparsity, range and dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.errors import PlanError, QuantizationError
from fewbits.plan import ACTIVATION_BITS, TensorPlan
from fewbits.quantizers import QUANTIZERS, LSQPlus, Quantizer, Uniform, make_quantizer

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PERTURBATIONS = ("no", "little", "negative", "zero", "tiny", "huge", "far")
KINDS = ("normal", "uniform", "constant", "zeros", "subnormal", "huge", "one sided", "tiny", "mixed")


def values(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Return a finite tensor of one kind of trouble."""
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    troubles = torch.tensor([0.0, -0.0, info.max, info.min, info.tiny, info.smallest_normal / 4, 1.0, -1e-3, 3.7])
    pick = torch.randint(len(troubles), shape, generator=generator)
    made = {
        "normal": normal,
        "uniform": unit * 5 + 2,
        "constant": torch.full(shape, float(normal.flatten()[0]), dtype=torch.float64),
        "zeros": torch.zeros(shape),
        "subnormal": unit * info.smallest_normal,
        "huge": unit.sign() * (1 - unit.abs() / 4) * info.max,
        "one sided": -unit.abs(),
        "tiny": unit * info.smallest_normal * 50,
        "mixed": torch.where(unit > 0.5, normal, troubles.double()[pick]),
    }[kind]
    return made.to(dtype).clamp(info.min, info.max)


@dataclass(frozen=True)
class Case:
    """One quantizer and one tensor."""

    plan: TensorPlan
    x: Tensor
    axis: int
    contraction: int
    perturb: str

    def quantizer(self, calibrated: bool = True) -> Quantizer:
        """Build the quantizer, calibrate it, and move its learned parameters where training might."""
        quantizer = make_quantizer(self.plan, shape=tuple(self.x.shape), axis=self.axis, contraction=self.contraction)
        if calibrated:
            quantizer.calibrate(self.x)
        perturb(quantizer, self.perturb)
        return quantizer


def perturb(quantizer: Quantizer, how: str) -> None:
    """Move learned parameters: another sign, far away, or a little."""
    change = {
        "no": lambda p: p,
        "little": lambda p: p * 1.0371 + 1e-3,
        "negative": lambda p: -p,
        "zero": lambda p: p * 0,
        "tiny": lambda p: p * 0 + 1e-42,
        "huge": lambda p: p * 0 + 2.2e38,  # twice that is infinite
        "far": lambda p: p * 0 + 123456.7,
    }[how]
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.copy_(change(parameter))


def options_of(name: str, symmetric: bool, bits: int) -> st.SearchStrategy[dict[str, Any]]:
    """Return what may be given as options."""
    menu: list[dict[str, Any]] = [{}]
    if name in ("ste", "lsq") and symmetric:
        menu += [{"narrow": True}, {"narrow": False}, {"odd": True}, {"odd": False}]
    if name == "denoise":
        menu += [{"lam": lam, "gradient": g} for lam in (1e-30, 1e-4, 1e30) for g in ("denoise", "gain", "ste")]
        menu += [{"detach_range": True}, *([{"odd": True}] if symmetric else [])]
        menu += [{"range": "absmean"}] * 3 if bits == 1 or (bits == 2 and symmetric) else []
    return st.sampled_from(menu)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from(("ste", "lsq", "lsq+", "denoise", "dynamic", "bitnet", "paretoq", "pact", "n2uq")))
    widths = {"bitnet": (1, 2), "paretoq": (1,), "pact": (2, 3, 4, 8, 16), "n2uq": (2, 3, 4, 8)}
    bits = draw(st.sampled_from(widths.get(name, ACTIVATION_BITS)))
    symmetric = name in ("bitnet", "paretoq") or (name != "lsq+" and draw(st.booleans()))
    shape = tuple(draw(st.lists(st.integers(1, 8), min_size=1, max_size=4)))
    granularity = "tensor" if name == "n2uq" else draw(st.sampled_from(("tensor", "channel", "block", "head")))
    block = draw(st.integers(1, 9)) if granularity == "block" else None
    axis, contraction = draw(st.integers(0, len(shape) - 1)), draw(st.integers(-1, len(shape) - 1))
    groups = [m for m in range(2, 9) if shape[contraction] % m == 0 and (block or m) % m == 0]
    apart = (axis - contraction) % len(shape) != 0 or granularity in ("tensor", "block")
    groups = groups if symmetric and apart and QUANTIZERS[name].can_prune and draw(st.booleans()) else []
    of = draw(st.sampled_from(groups)) if groups else 0
    plan = TensorPlan(
        bits=bits,
        quantizer=name,
        symmetric=symmetric,
        granularity=granularity,
        block=block,
        range=draw(st.sampled_from(("minmax", "percentile", "mse"))),
        sparsity=f"{draw(st.integers(1, of - 1))}:{of}" if of else None,
        options=draw(options_of(name, symmetric, bits)),
    )
    x = values(draw(st.sampled_from(KINDS)), shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)))
    how = draw(st.sampled_from(PERTURBATIONS))
    return Case(plan, x, axis, contraction, how)


@pytest.mark.filterwarnings("ignore:.*unsigned 'pact'")
@settings(max_examples=250)
@given(cases())
def test_decode_of_encode_is_forward(case: Case) -> None:
    quantizer = case.quantizer()
    y = quantizer(case.x)
    codes = quantizer.encode(case.x)
    assert torch.equal(codes.decode(), y)
    assert y.shape == case.x.shape and y.dtype == case.x.dtype
    assert bool(torch.isfinite(y).all())
    assert not codes.values.is_floating_point() and codes.values.shape == case.x.shape
    pruned = quantizer.pruned(case.x)
    assert pruned is None or bool((codes.values[pruned] == 0).all())
    kept = codes.values if pruned is None else codes.values[~pruned]
    index = codes.grid.index(kept)
    assert int(index.min()) >= 0 and int(index.max()) <= 2**case.plan.bits - 1
    assert torch.equal(codes.grid.value(index), kept)  # on the grid, also where it steps by 2
    assert int(codes.values.min()) >= codes.grid.lowest and int(codes.values.max()) <= codes.grid.highest
    assert bool((codes.scale > 0).all()) and bool(torch.isfinite(codes.scale).all())
    if codes.zero_point is not None:
        assert codes.grid.lowest <= int(codes.zero_point.min())
        assert int(codes.zero_point.max()) <= codes.grid.highest


@pytest.mark.parametrize("how", PERTURBATIONS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("name", "symmetric"), [("lsq", True), ("lsq", False), ("lsq+", False)])
def test_the_law_holds_wherever_training_takes_the_parameters(name: str, symmetric: bool, bits: int, how: str) -> None:
    x = torch.randn(3, 8)
    quantizer = build(bits, name, symmetric=symmetric)
    quantizer.calibrate(x)
    x[0, :2] = torch.tensor([3.4e38, -3.4e38])
    before = quantizer(x)
    perturb(quantizer, how)
    y, codes = quantizer(x), quantizer.encode(x)
    assert torch.equal(y, before) or how != ("no" if name == "lsq+" else "negative")  # a step has no sign
    assert torch.equal(codes.decode(), y) and bool(torch.isfinite(y).all())
    scale, zero = quantizer.affine()
    assert bool((scale > 0).all()) and torch.equal(scale, codes.scale)
    if zero is not None:  # an integer on the grid, whatever was learned
        assert torch.equal(zero, quantizer.zero_point.round().clamp(0, 2**bits - 1))
        assert torch.equal(zero, codes.zero_point.float())


@settings(max_examples=80)
@given(cases())
def test_gradients_are_finite(case: Case) -> None:
    x = case.x.clamp(-1e15, 1e15) if case.x.dtype != torch.float16 else case.x
    how = "little" if case.perturb == "huge" else case.perturb  # sums of products above finfo.max are infinite
    case = Case(case.plan, x, case.axis, case.contraction, how)
    quantizer, x = case.quantizer(), x.clone().requires_grad_()
    y = quantizer(x)
    y.float().sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape and x.grad.dtype == x.dtype
    assert bool(torch.isfinite(x.grad).all())
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 3),
        lambda x: x[:, :, ::2],
        lambda x: x[:1, :, :, :1].expand(3, 4, 6, 6),
    ],
    ids=["channels last", "transposed", "strided", "expanded"],
)
def test_the_law_holds_for_every_layout_of_memory(layout: Callable[[Tensor], Tensor], granularity: str) -> None:
    x = layout(torch.randn(3, 4, 6, 6))
    plan = TensorPlan(3, granularity=granularity, block=3 if granularity == "block" else None)
    q = make_quantizer(plan, shape=tuple(x.shape), axis=1)
    q.calibrate(x)
    y = q(x)
    assert torch.equal(q.encode(x).decode(), y) and torch.equal(q(x.contiguous()), y)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_law_holds_for_a_long_row(symmetric: bool) -> None:
    x = torch.randn(3, 70001)
    q = make_quantizer(TensorPlan(4, symmetric=symmetric), shape=tuple(x.shape))
    q.calibrate(x)
    assert torch.equal(q.encode(x).decode(), q(x))


def build(bits: int = 4, quantizer: str = "ste", **fields: Any) -> Quantizer:
    """Return a quantizer for tensors [3, 8]; per channel is along axis 0."""
    return make_quantizer(TensorPlan(bits, quantizer, **fields), shape=(3, 8))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("verb", ["calibrate", "encode"])
def test_a_value_that_is_not_finite_is_a_named_error(verb: str, poison: float) -> None:
    x = torch.randn(3, 8)
    quantizer = build()
    quantizer.calibrate(x)
    before = quantizer.scale.clone()
    x[1, 2] = poison
    with pytest.raises(QuantizationError, match=r"1 of 24 values are NaN or Inf \(shape \(3, 8\)\)"):
        getattr(quantizer, verb)(x)
    assert torch.equal(quantizer.scale, before) and quantizer.calibrated == 1


def test_without_a_range_there_is_an_error_in_evaluation_and_a_range_in_training() -> None:
    x = torch.randn(3, 8)
    quantizer = build().eval()
    for verb in (quantizer, quantizer.encode):
        with pytest.raises(QuantizationError, match=r"no range yet.*calibrate"):
            verb(x)
    y = quantizer.train()(x)
    assert quantizer.calibrated == 1
    assert torch.equal(quantizer.eval()(x), y)
    quantizer(x * 100)
    assert quantizer.calibrated == 1  # only the first one sets it


def test_reset_forgets_the_range() -> None:
    quantizer, fresh = build(range="minmax"), build(range="minmax")
    quantizer.calibrate(torch.randn(3, 8) * 100)
    quantizer.reset()
    with pytest.raises(QuantizationError, match="no range yet"):
        quantizer.encode(torch.zeros(3, 8))
    x = torch.randn(3, 8)
    for q in (quantizer, fresh):
        q.calibrate(x)
        q.calibrate(x / 2)
    assert torch.equal(quantizer.scale, fresh.scale) and quantizer.calibrated == 2


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_minmax_over_several_calls_is_minmax_of_all(symmetric: bool, granularity: str) -> None:
    batches = [torch.randn(3, 8) * s for s in (1, 3, 0.1, 2)]
    quantizer, whole = (build(6, range="minmax", symmetric=symmetric, granularity=granularity) for _ in range(2))
    for batch in batches:
        quantizer.calibrate(batch)
    whole.calibrate(torch.cat(batches, dim=1))
    step = whole.scale.max()
    for got, want in zip(quantizer._span(*quantizer.affine()), whole._span(*whole.affine())):
        torch.testing.assert_close(got, want, atol=float(2 * step), rtol=0.1)
    assert bool((quantizer.scale >= whole.scale * 0.98).all())


@pytest.mark.parametrize("method", ["mse", "percentile"])
def test_other_ranges_over_several_calls_are_the_mean(method: str) -> None:
    """Shares below half a step add up: a zero point that is rounded in between would stay where it began."""
    low, high = torch.linspace(-1, 1, 1001)[None], torch.linspace(0, 4, 1001)[None]
    quantizer = build(4, symmetric=False, range=method)
    for batch in [low] * 20 + [high] * 60:
        quantizer.calibrate(batch)
    lowest, highest = quantizer._span(*quantizer.affine()).flatten().tolist()
    assert lowest == pytest.approx((20 * -1 + 60 * 0) / 80, abs=0.2)
    assert highest == pytest.approx((20 * 1 + 60 * 4) / 80, abs=0.35)


def test_merging_survives_values_near_the_largest() -> None:
    for symmetric in (True, False):
        quantizer = build(2, symmetric=symmetric)
        for sign in (1, -1, 1):
            quantizer.calibrate(torch.full((3, 8), sign * 3.4e38))
        assert bool(torch.isfinite(quantizer(torch.full((3, 8), 3.4e38))).all())


@pytest.mark.parametrize("quantizer", ["ste", "lsq", "lsq+"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_law_holds_after_the_quantizer_itself_was_cast(quantizer: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 8).to(dtype) * 1e-7  # a scale that float16 rounds to zero
    q = build(4, quantizer, symmetric=False)
    q.calibrate(x)
    q.to(dtype)
    assert torch.equal(q.encode(x).decode(), q(x)) and bool(torch.isfinite(q(x)).all())


def test_rounding_is_to_the_nearest_with_ties_to_even() -> None:
    q = build(4)
    q.calibrate(torch.ones(3, 8))
    q.scale.fill_(0.5)
    x = torch.tensor([[0.25, 0.75, 1.25, -0.25, -0.75, 0.24, 100.0, -100.0]])
    assert q.encode(x).values.tolist() == [[0, 2, 2, 0, -2, 0, 7, -8]]


@pytest.mark.parametrize(
    ("bits", "fields", "lowest", "highest"),
    [
        (1, {}, -1, 1),
        (2, {}, -2, 1),
        (3, {"options": {"narrow": True}}, -3, 3),
        (2, {"options": {"odd": True}}, -3, 3),
        (8, {}, -127, 127),
        (8, {"options": {"narrow": False}}, -128, 127),
        (8, {"symmetric": False}, 0, 255),
        (16, {"symmetric": False}, 0, 65535),
    ],
)
def test_grids(bits: int, fields: dict[str, Any], lowest: int, highest: int) -> None:
    q = build(bits, **fields)
    x = torch.linspace(-1, 1, 24).reshape(3, 8) * 1e3
    q.calibrate(x)
    q.scale.fill_(1e-4)
    codes = q.encode(x).values
    assert (int(codes.min()), int(codes.max())) == (lowest, highest)


@pytest.mark.parametrize(
    ("quantizer", "fields", "message"),
    [
        ("lsq+", {}, "symmetric=False"),
        ("ste", {"symmetric": False, "options": {"odd": True}}, "symmetric=True"),
        ("ste", {"symmetric": False, "options": {"narrow": True}}, "narrow"),
        ("ste", {"options": {"odd": True, "narrow": True}}, "narrow"),
        ("ste", {"range": "percentile", "options": {"percentile": 30}}, "percentile must be above 50"),
        ("ste", {"options": {"percentile": 99}}, "percentile=99 with range='mse'"),
        ("ste", {"options": {"percentil": 99}}, "percentil"),
        ("lsk", {}, "did you mean 'lsq'"),
    ],
)
def test_impossible_combinations_are_plan_errors(quantizer: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        build(4, quantizer, **fields)


def test_an_empty_tensor_passes_and_leaves_the_range_alone() -> None:
    """A detector without proposals feeds its head [0, features]."""
    q = build(symmetric=False)
    assert q(torch.empty(0, 8)).shape == (0, 8) and not q.calibrated
    q.calibrate(torch.empty(0, 8))
    assert not q.calibrated
    q.calibrate(torch.randn(3, 8))
    before = q.scale.clone()
    assert q(torch.empty(0, 8, requires_grad=True)).requires_grad
    q.calibrate(torch.empty(0, 8))
    assert torch.equal(q.scale, before)
    assert torch.equal(q.encode(torch.empty(0, 8)).decode(), torch.empty(0, 8))


def test_a_tensor_of_another_shape_is_a_named_error() -> None:
    q = build(granularity="channel")
    with pytest.raises(QuantizationError, match=r"4 groups .channel.*holds 3 scales"):
        q.calibrate(torch.randn(4, 8))
    q.calibrate(torch.randn(3, 8))
    with pytest.raises(QuantizationError, match=r"4 groups .channel.*holds 3 scales"):
        q(torch.randn(4, 8))


def test_state_dict_brings_ranges_and_that_they_are_there() -> None:
    for name in ("ste", "lsq", "lsq+"):
        first, second = (build(4, name, symmetric=False, granularity="channel") for _ in range(2))
        first.calibrate(torch.randn(3, 8))
        second.load_state_dict(first.state_dict())
        x = torch.randn(3, 8)
        assert torch.equal(first.eval()(x), second.eval()(x)) and second.calibrated == 1


def test_what_trains() -> None:
    names = {
        name: {n for n, _ in build(4, name, symmetric=False).named_parameters()} for name in ("ste", "lsq", "lsq+")
    }
    assert names == {"ste": set(), "lsq": {"scale"}, "lsq+": {"scale", "zero_point"}}
    assert set(QUANTIZERS) >= set(names) and issubclass(LSQPlus, Uniform)


@pytest.mark.parametrize("name", ["lsq", "lsq+"])
def test_learning_lowers_the_error_from_a_bad_start(name: str) -> None:
    x = torch.randn(3, 8) + 0.5
    q = build(3, name, symmetric=False, granularity="channel")
    q.calibrate(x)
    with torch.no_grad():
        q.scale.mul_(4)
    optimizer = torch.optim.Adam(q.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (q(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
