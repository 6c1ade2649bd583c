from __future__ import annotations

import pytest
import torch

import fewbits as fb
from fewbits.errors import RecipeError
from fewbits.layers.concat import Concat
from fewbits.tasks.unet import FUSIONS, SIZES, GatedAdd, UNet


@pytest.mark.parametrize("fusion", FUSIONS)
def test_logits_have_the_size_of_the_image_whatever_it_is(fusion: str) -> None:
    model = UNet(5, widths=(4, 6, 8), fusion=fusion).eval()
    for size in ((32, 32), (30, 45), (4, 7)):
        assert model(torch.randn(2, 3, *size)).shape == (2, 5, *size)


def test_sizes_are_those_that_are_told() -> None:
    counts = [sum(p.numel() for p in UNet(11, widths=widths).parameters()) for widths in SIZES.values()]
    assert [round(c / 1e6, 1) for c in counts] == [0.2, 0.5, 1.0, 7.2]


def test_branches_meet_in_named_nodes_at_every_level() -> None:
    model, met = UNet(3, widths=(4, 6, 8)), {}
    for name, node in model.named_modules():
        if isinstance(node, Concat):
            node.register_forward_hook(
                lambda m, args, out, name=name: met.update({name: [tuple(a.shape) for a in args]})
            )
    model(torch.zeros(1, 3, 32, 32))
    assert met == {"up.0.fuse": [(1, 6, 16, 16)] * 2, "up.1.fuse": [(1, 4, 32, 32)] * 2}
    assert all(node.branches == ("up", "skip") for node in model.modules() if isinstance(node, Concat))


def test_the_gate_lets_through_a_share_of_the_skip() -> None:
    node, up, skip = GatedAdd(4).eval(), torch.randn(1, 4, 5, 5), torch.randn(1, 4, 5, 5)
    torch.nn.init.constant_(node.to_gate.bias, -50.0)
    torch.nn.init.zeros_(node.to_gate.weight)
    assert torch.allclose(node(up, skip), up)
    torch.nn.init.zeros_(node.to_gate.bias)
    assert torch.allclose(node(up, skip), up + skip / 2)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_it_packs_without_losing_a_bit(fusion: str) -> None:
    model, x = UNet(3, widths=(4, 6, 8), fusion=fusion), torch.randn(2, 3, 16, 16)
    fb.quantize(model, fb.uniform_plan(model, 4, 4, first_last=8), verbose=False)
    fb.calibrate(model, [x])
    assert torch.equal(fb.pack(model)(x), model.eval()(x))


def test_what_makes_no_unet_is_an_error() -> None:
    with pytest.raises(RecipeError, match="one of .*got 'sum'"):
        UNet(3, fusion="sum")
    with pytest.raises(RecipeError, match="two levels"):
        UNet(3, widths=(4,))
