"""Which results need an output quantizer: held against lists made by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbits as fb
from fewbits.layers import open_ends
from fewbits.plan import LayerPlan, Plan, TensorPlan
from fewbits.tasks import build_model


@pytest.mark.parametrize(("name", "size"), [("resnet20", 32), ("torchvision:resnet18", 64)])
def test_residual_networks(name: str, size: int) -> None:
    model, x = build_model(name, num_classes=10), torch.randn(1, 3, size, size)
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    by_hand = [n for n in norms if n == "bn1" or n.endswith(("bn2", "sample.1"))]
    assert open_ends(model, x) == by_hand
    act = TensorPlan(4, symmetric=False)
    fb.quantize(model, Plan((("*", LayerPlan(TensorPlan(4), act)), ("bn1", LayerPlan(output=act)))), verbose=False)
    fb.calibrate(model, [x])
    assert open_ends(model, x) == by_hand


def test_mobilenet_v3_small() -> None:
    model = build_model("torchvision:mobilenet_v3_small", num_classes=10)
    blocks = [f"features.{i}.block" for i in range(1, 12)]
    by_hand = {"features.0.1", "features.12.1"}  # before a hard swish
    by_hand |= {"features.1.block.0.1"}  # ReLU, but then squeeze and excitation
    by_hand |= {f"{b}.{i}.1" for b in blocks[3:] for i in (0, 1)}  # hard swish, and on to the excitation
    by_hand |= {f"{b}.fc2" for b in ["features.1.block.1", *(f"{b}.2" for b in blocks[3:])]}  # multiplied
    by_hand |= {"features.2.block.2.1", "features.3.block.2.1"}  # added: a block and its predecessor
    by_hand |= {f"{b}.3.1" for b in blocks[3:]}
    assert set(open_ends(model, torch.randn(1, 3, 64, 64))) == by_hand


class Two(nn.Module):
    """Two convolutions, with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


@pytest.mark.parametrize(
    ("between", "found"),
    [
        (F.relu, []),
        (lambda x: F.relu_(x), []),
        (lambda x: F.dropout(F.relu6(x), training=False).flatten(2).unsqueeze(-1), []),
        (lambda x: x + 1, ["a"]),
        (lambda x: F.relu(x).add_(1), ["a"]),
        (lambda x: torch.cat([x, x], 1)[:, :2], ["a"]),
        (lambda x: F.max_pool2d(F.relu(x), 2), ["a"]),
        (lambda x: F.hardswish(input=x), ["a"]),
    ],
)
def test_what_is_between_two_convolutions(between: Callable[[Tensor], Tensor], found: list[str]) -> None:
    model, x = Two(between), torch.randn(1, 2, 4, 4)
    assert open_ends(model, x) == found
    assert open_ends(model, x, inputs=["a"]) == ["a"]  # b takes float
    assert open_ends(model, x, inputs=["b"]) == []  # a runs in float anyway
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_a_result_that_two_meet_is_its_own_end_and_not_the_norm_s() -> None:
    class Meeting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.next = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.next(self.norm(y)) * y

    assert open_ends(Meeting(), torch.randn(1, 2, 4, 4)) == ["conv", "next"]


def test_a_layer_that_is_called_by_keyword_uses_its_input() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(input=self.a(x))
            return result

    x = torch.randn(1, 2, 4, 4)
    assert open_ends(ByKeyword(), x, inputs=["a"]) == ["a"]  # b takes float
    assert open_ends(ByKeyword(), x) == []
