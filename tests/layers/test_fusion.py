"""A balanced fusion node: what it computes, what it measures, and where its controller takes the gains."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.errors import PlanError, QuantizationError
from fewbits.layers import BalancedFusion, FusionSettings, update_fusion
from fewbits.train import parameter_groups


def pair(*widths: int, size: int = 5) -> list[Tensor]:
    return [torch.randn(2, c, size, size, requires_grad=True) for c in widths or (3, 4)]


@pytest.mark.parametrize("mode", ["controller", "fixed", "learned", "off"])
def test_the_norm_leaves_mean_0_and_std_1_at_each_place(mode: str) -> None:
    node = BalancedFusion(2, FusionSettings(mode))
    y = node(pair(3, 4))
    assert y.shape == (2, 7, 5, 5)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 5, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.std(1, unbiased=False), torch.ones(2, 5, 5), atol=1e-3, rtol=0)


def test_gains_are_on_the_simplex_and_are_those_that_were_asked_for() -> None:
    node = BalancedFusion(3, FusionSettings("fixed", gains=(1, 2, 5), norm=False))
    torch.testing.assert_close(node.gains, torch.tensor([0.125, 0.25, 0.625]))
    xs = pair(2, 2, 2)
    torch.testing.assert_close(node(xs), torch.cat([xs[0] / 8, xs[1] / 4, xs[2] * 0.625], 1))
    torch.testing.assert_close(BalancedFusion(4).gains, torch.full((4,), 0.25))


def test_off_without_a_norm_is_the_plain_operator() -> None:
    xs, settings = pair(3, 3), FusionSettings("off", norm=False)
    assert torch.equal(BalancedFusion(2, settings)(xs), torch.cat(xs, 1))
    assert torch.equal(BalancedFusion(2, settings, op="add")(xs), xs[0] + xs[1])


def test_the_loss_and_weight_decay_leave_lambda_alone_unless_it_is_learned() -> None:
    for mode, trains in (("controller", False), ("fixed", False), ("off", False), ("learned", True)):
        net = nn.Sequential(nn.Conv2d(7, 2, 1))
        node = net[0].node = BalancedFusion(2, FusionSettings(mode, gains=None if mode == "off" else (1, 3)))
        before = node.lam.detach().clone()
        assert ([n for n, _ in node.named_parameters()] == ["lam"]) is trains
        groups = parameter_groups(net, 0.1, 0.5)
        assert all(g["weight_decay"] == 0 for g in groups if any(p is node.lam for p in g["params"]))
        optimizer = torch.optim.SGD(groups)
        net[0](node(pair(3, 4))).square().sum().backward()
        optimizer.step()
        assert torch.equal(node.lam.detach(), before) is not trains


def test_energy_is_the_norm_of_the_gradient_through_this_node_only() -> None:
    xs, weight = pair(3, 4), torch.randn(7, 1, 1)
    node = BalancedFusion(2, FusionSettings(energy="l2", gains=(1, 3)))

    def through(given: list[Tensor]) -> Tensor:
        return (node(given) * weight).relu().sum()

    wanted = [g.norm() for g in torch.autograd.grad(through(xs), xs)]
    node.take_squares()
    (through(xs) + 5 * xs[1].square().sum()).backward()  # xs[1] has another consumer
    torch.testing.assert_close(node.take_squares().sqrt(), torch.stack(wanted))
    assert float(xs[1].grad.norm()) > 2 * float(wanted[1])


def test_a_branch_that_is_not_trained_is_measured_too() -> None:
    xs, weight = pair(3, 4), torch.randn(7, 1, 1)
    node, image = BalancedFusion(2, FusionSettings(energy="l2")), xs[1].detach()
    wanted = [g.norm() for g in torch.autograd.grad((node(xs) * weight).relu().sum(), xs)]
    node.take_squares()
    (node([xs[0], image]) * weight).relu().sum().backward()
    torch.testing.assert_close(node.take_squares().sqrt(), torch.stack(wanted))
    assert not image.requires_grad


def test_rms_energy_does_not_grow_with_the_width_of_a_branch() -> None:
    xs = pair(4, 64)
    for energy, expected in (("rms", 0.0), ("l2", -0.5 * math.log(16))):
        node = BalancedFusion(2, FusionSettings(energy=energy, norm=False))
        node(xs).sum().backward()  # the same gradient everywhere
        update_fusion(node)
        assert node.log_ratio() == pytest.approx(expected, abs=1e-5)


def test_no_hooks_in_eval_mode_without_gradients_or_with_watching_off() -> None:
    node = BalancedFusion(2)
    for prepare in (lambda: node.eval(), lambda: setattr(node.train(), "watching", False)):
        prepare()
        node(pair()).sum().backward()
        assert not node.take_squares().any()


def loop(node: BalancedFusion, scales: list[float], steps: int = 200, noise: float = 0.0) -> list[list[float]]:
    """Run the controller on losses whose gradients of F'_i have these norms, whatever the gains; return lambdas."""
    generator = torch.Generator().manual_seed(0)
    lambdas = []
    for _ in range(steps):
        xs = [torch.randn(2, 3, 4, 4, requires_grad=True, generator=generator) for _ in scales]
        parts = torch.split(node(xs), 3, dim=1)
        jitter = [math.exp(noise * float(torch.randn((), generator=generator))) for _ in scales]
        sum(s * j * p.sum() for s, j, p in zip(scales, jitter, parts)).backward()  # type: ignore[union-attr]
        update_fusion(node)
        lambdas.append(node.lam.tolist())
    return lambdas


def test_the_controller_balances_an_eightfold_difference_within_200_steps() -> None:
    node = BalancedFusion(2, FusionSettings(norm=False))
    loop(node, [8.0, 1.0])
    assert abs(node.log_ratio()) < 0.1
    gains = node.gains
    assert float(gains[1] / gains[0]) == pytest.approx(8, rel=0.05)
    assert float(node.lam.sum()) == pytest.approx(0, abs=1e-5)


def test_a_target_offset_is_reached_and_three_branches_work() -> None:
    tau = (0.6, -0.2, -0.4)
    node = BalancedFusion(3, FusionSettings(norm=False, tau=tau))
    loop(node, [2.0, 1.0, 0.5], steps=300)
    logs = node.log_energies()
    assert (logs - logs.mean()).tolist() == pytest.approx(tau, abs=0.02)


def test_the_defaults_do_not_ring_and_a_fast_loop_on_a_slow_average_does() -> None:
    def overshoot(eta: float, beta: float) -> float:
        wanted = math.log(7.4) / 2
        node = BalancedFusion(2, FusionSettings(norm=False, eta=eta, beta=beta, limit=100.0))
        return max(abs(lam[0]) for lam in loop(node, [7.4, 1.0], 400, noise=0.5)) / wanted - 1

    assert overshoot(0.025, 0.1) < 0.4
    assert overshoot(0.3, 0.01) > 3


def test_an_add_has_nothing_to_balance_and_stays_at_equal_gains() -> None:
    node = BalancedFusion(2, FusionSettings(gains=(1, 4)), op="add")
    for _ in range(300):
        node(pair(3, 3)).relu().sum().backward()
        update_fusion(node)
    torch.testing.assert_close(node.gains, torch.tensor([0.5, 0.5]), atol=0.01, rtol=0)


def test_gains_are_clamped_and_the_steps_counted() -> None:
    node = BalancedFusion(2, FusionSettings(norm=False, limit=0.2))
    loop(node, [8.0, 1.0], 50)
    assert node.lam.tolist() == pytest.approx([-0.2, 0.2])
    assert 20 < node.clamped < 50


@pytest.mark.parametrize("squares", [[math.nan, 1.0], [math.inf, 1.0], [0.0, 0.0]])
def test_energies_that_say_nothing_leave_the_state_as_it_is(squares: list[float]) -> None:
    node = BalancedFusion(2)
    node.update(torch.tensor([4.0, 1.0]))
    before = copy.deepcopy(node.state_dict())
    node.update(torch.tensor(squares))
    assert all(torch.equal(v, before[k]) for k, v in node.state_dict().items() if isinstance(v, Tensor))


def test_frozen_gains_stay_and_energies_are_still_measured() -> None:
    node = BalancedFusion(2)
    node.frozen = True
    node.update(torch.tensor([4.0, 1.0]))
    assert node.lam.tolist() == [0, 0] and node.log_ratio() == pytest.approx(math.log(2))


def test_accumulated_batches_are_one_update_of_their_summed_energies() -> None:
    xs, ys = pair(3, 3), pair(3, 3)
    one, two = BalancedFusion(2), BalancedFusion(2)
    loss = lambda node, given: (node(given).square() * torch.arange(6.0)[:, None, None]).relu().sum()  # noqa: E731
    (loss(one, xs) + loss(one, ys)).backward()
    loss(two, xs).backward()
    loss(two, ys).backward()
    update_fusion(one)
    update_fusion(two)
    torch.testing.assert_close(one.state_dict()["lam"], two.state_dict()["lam"])
    assert not two.take_squares().any()


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_a_loss_scale_changes_no_gain_and_is_taken_out_of_the_energy(scale: float) -> None:
    xs, node = pair(3, 3), BalancedFusion(2, FusionSettings(energy="l2"))
    (scale * (node(xs)[:, :4] ** 3).sum()).backward()
    squares = torch.stack([x.grad.square().sum() for x in xs]) / scale**2  # type: ignore[union-attr]
    update_fusion(node, loss_scale=scale)
    torch.testing.assert_close(node.energy, squares.sqrt())
    other = BalancedFusion(2)
    other.update(squares * scale**2)
    torch.testing.assert_close(other.lam, node.lam)


def test_half_precision_is_normalised_in_float32_and_comes_back_as_it_was() -> None:
    xs = [1000 * x.detach().half() for x in pair(8, 8)]
    y = BalancedFusion(2)(xs)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), BalancedFusion(2)([x.float() for x in xs]), atol=2e-3, rtol=2e-3)
    with torch.autocast("cpu", torch.bfloat16):
        node = BalancedFusion(2)
        node([nn.Conv2d(3, 3, 1)(x) for x in pair(3, 3)]).float().square().mean().backward()
        assert node.lam.dtype == torch.float32 and bool((node.take_squares() > 0).all())


def test_state_goes_through_a_checkpoint_and_a_plain_one_leaves_it_alone() -> None:
    node, other = BalancedFusion(2), BalancedFusion(2)
    loop(node, [8.0, 1.0], 5)
    node.frozen = True
    buffer = io.BytesIO()
    torch.save(node.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(node.lam, other.lam) and torch.equal(node.energy, other.energy) and other.frozen
    holder = nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1), "node": node})
    floats = {k: v for k, v in holder.state_dict().items() if k.startswith("conv")}
    holder.load_state_dict(floats)
    assert torch.equal(node.lam, other.lam)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "auto"}, "mode of a fusion must be one of"),
        ({"energy": "max"}, "energy of a fusion must be one of"),
        ({"beta": 0.0}, "0 < beta <= 1"),
        ({"eta": -1.0}, "eta, limit and norm_eps above 0 and finite"),
        ({"gains": (1.0, -1.0)}, "positive numbers"),
        ({"gains": (1.0, 1.0), "mode": "off"}, "none if 'off'"),
        ({"tau": (1.0, 0.0)}, "sums to zero"),
        ({"tau": (math.nan, math.nan)}, "sums to zero"),
        ({"eta": math.inf}, "above 0 and finite"),
        ({"gains": (1.0, 1.0, 1.0)}, "gains has 3 numbers, the node 2 branches"),
    ],
)
def test_settings_out_of_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        BalancedFusion(2, FusionSettings(**given))


def test_one_branch_or_branches_of_other_sizes_are_refused() -> None:
    with pytest.raises(PlanError, match="needs two branches or more, got 1"):
        BalancedFusion(1)
    node = BalancedFusion(2, label="fusion node 'neck.cat0'")
    with pytest.raises(QuantizationError, match=r"'neck.cat0': branches of shapes .*\[2, 3, 5, 5\], \[2, 3, 6, 6\]"):
        node([torch.randn(2, 3, 5, 5), torch.randn(2, 3, 6, 6)])
    with pytest.raises(QuantizationError, match="measure='inputs' is for nodes that balance_fusion puts"):
        BalancedFusion(2, FusionSettings(measure="inputs"))(pair(3, 4))
    with pytest.raises(QuantizationError, match="agree in every axis"):
        BalancedFusion(2, op="add")([torch.randn(2, 3, 5, 5), torch.randn(2, 3, 1, 1)])
    with pytest.raises(QuantizationError, match="got 3 tensors for the branches"):
        node(pair(1, 1, 1))
