import copy

import pytest
import torch
from torch import nn

import fewbits as fb
from fewbits import LayerPlan, Plan, TensorPlan
from fewbits.deploy import PackedLayer, code_mismatches
from fewbits.errors import PlanError, QuantizationError
from tests.deploy.models import Residual, plan_for, quantized, randomize

KINDS = {
    "lsq": {},
    "sparse lsq": {"sparsity": "1:2"},
    "denoise affine": {"quantizer": "denoise", "symmetric": False},
    "denoise linear": {"quantizer": "denoise"},
    "sparse denoise": {"quantizer": "denoise", "sparsity": "2:4"},
    "dynamic": {"quantizer": "dynamic", "symmetric": False},
}


def plan_of(kind: str, bits: int, act: int | None, granularity: str) -> Plan:
    """Return one rule for all layers; where sparse, with a dense first one, whose three channels have no groups."""
    block = None if granularity != "block" else 4 if "sparsity" in KINDS[kind] else 3
    plan = plan_for(bits, act, granularity=granularity, block=block, **KINDS[kind])
    dense = plan_for(bits, act, granularity=granularity, block=block).rules[0][1]
    return plan.override(("conv1", dense)) if "sparsity" in KINDS[kind] else plan


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_packed_equals_trained_bit_for_bit(bits: int, granularity: str, kind: str) -> None:
    x = torch.randn(4, 3, 12, 12)
    model = quantized(randomize(Residual()), plan_of(kind, bits, 4, granularity), [x])
    packed = fb.pack(model)
    assert torch.equal(packed(x), model(x))
    assert code_mismatches(model, packed) == 0
    assert not any(name.endswith("conv1.weight") for name, _ in packed.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_folded_norms_change_no_more_than_float32_rounding(granularity: str, kind: str) -> None:
    x = torch.randn(4, 3, 12, 12)
    model = quantized(randomize(Residual()), plan_of(kind, 3, None, granularity), [x])
    packed = fb.pack(model, x)
    assert packed.folded == {"bn1": "conv1", "bn2": "conv2"}
    assert isinstance(packed.bn1, nn.Identity)
    torch.testing.assert_close(packed(x), model(x), rtol=1e-5, atol=1e-5)
    assert code_mismatches(model, packed) == 0


def test_a_norm_whose_input_has_another_consumer_is_not_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.bn(y) + y

    x = torch.randn(2, 2, 4, 4)
    model = quantized(randomize(Shared()), plan_for(4), [x])
    packed = fb.pack(model, x)
    assert packed.folded == {}
    assert torch.equal(packed(x), model(x))


def test_an_output_quantizer_stays_where_its_norm_is_folded() -> None:
    x = torch.randn(4, 3, 12, 12)
    output = LayerPlan(output=TensorPlan(8, "ste", symmetric=False))
    model = quantized(randomize(Residual()), plan_for(4).override(("bn2", output)), [x])
    packed = fb.pack(model, x)
    assert packed.bn2 is not model.bn2
    assert packed.bn2.bits == 8
    torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-4)


def test_tied_weights_are_packed_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x))

    plan = Plan((("*", LayerPlan(TensorPlan(4, granularity="channel"))),))
    model = fb.quantize(Tied(), plan, verbose=False).eval()
    packed = fb.pack(model)
    x = torch.arange(16)[None]
    assert packed.embed.packed is packed.head.packed
    assert torch.equal(packed(x), model(x))


def test_packing_leaves_the_model_alone_and_copies_work() -> None:
    x = torch.randn(2, 3, 12, 12)
    model = quantized(Residual(), plan_for(2), [x]).train()
    before = copy.deepcopy(model.state_dict())
    packed = fb.pack(model, x)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if isinstance(v, torch.Tensor))
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))
    assert isinstance(packed.conv1, PackedLayer)
    assert isinstance(packed.conv1, nn.Conv2d)


def test_a_model_that_is_not_quantized_is_refused() -> None:
    with pytest.raises(PlanError, match=r"call fewbits\.quantize"):
        fb.pack(Residual())


def test_weights_that_are_not_finite_are_named() -> None:
    model = quantized(Residual(), plan_for(4), [torch.randn(2, 3, 12, 12)])
    with torch.no_grad():
        model.conv2.weight[0] = float("nan")
    with pytest.raises(QuantizationError, match="'conv2'.*NaN or Inf"):
        fb.pack(model)


def test_a_norm_whose_input_is_returned_too_is_not_folded() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.conv(x)
            return self.bn(y), y

    x = torch.randn(2, 2, 4, 4)
    model = quantized(randomize(Both()), plan_for(4), [x])
    assert fb.pack(model, x).folded == {}


def test_a_norm_that_is_called_by_keyword_is_folded_too() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.norm(input=self.conv(x))
            return result

    x = torch.randn(4, 2, 5, 5)
    model = quantized(randomize(ByKeyword()), plan_for(4, 4), [x])
    packed = fb.pack(model, x)
    assert packed.folded == {"norm": "conv"}
    torch.testing.assert_close(packed(x), model.eval()(x))
