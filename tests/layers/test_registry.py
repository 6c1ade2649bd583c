"""The registry of twins: subclasses, new types, and which classes have none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fewbits.errors import PlanError, QuantizationError
from fewbits.layers import QuantizedLayer, dequantize, quantizable, quantize, quantizes, report_layers, twin_class
from fewbits.layers.base import TWINS, type_name
from fewbits.plan import LayerPlan, Plan, TensorPlan

W4 = LayerPlan(weight=TensorPlan(4))


class Renamed(nn.Linear):
    """Only another name."""


class Doubled(nn.Linear):
    """Means something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Grandchild(Doubled):
    """Inherits a forward that is not Linear's."""


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Put the registry back after a test that adds to it."""
    before = dict(TWINS)
    yield
    TWINS.clear()
    TWINS.update(before)
    quantizes()(QuantizedLayer)  # a registration, so that classes are looked up anew


def test_a_subclass_counts_as_its_base_unless_it_overrides_forward() -> None:
    assert twin_class(Renamed) is not None and issubclass(twin_class(Renamed), Renamed)
    assert twin_class(Doubled) is None and twin_class(Grandchild) is None
    assert twin_class(nn.LayerNorm) is None
    assert twin_class(Renamed) is twin_class(Renamed)


def test_a_subclass_that_overrides_forward_is_reported_by_a_glob_and_an_error_by_name() -> None:
    model = nn.ModuleDict({"plain": nn.Linear(2, 2), "doubled": Doubled(2, 2), "child": Grandchild(2, 2)})
    quantize(model, Plan((("*", W4),)), verbose=False)
    rows = {row.name: row for row in report_layers(model)}
    assert rows["plain"].plan == W4
    for name in ("doubled", "child"):
        assert rows[name].plan is None
        assert rows[name].reason == "overrides forward of Linear: register a twin for it"
    for name in ("doubled", "child"):
        with pytest.raises(PlanError, match=f"'{name}' cannot be quantized: overrides forward of Linear"):
            quantize(model, Plan(((name, W4),)), verbose=False)


def test_a_type_without_twin_is_an_error_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.raises(PlanError, match=r"'1' cannot be quantized: no quantized twin for this type \(LayerNorm\)"):
        quantize(model, Plan((("1", W4),)), verbose=False)


def test_a_forward_replaced_on_the_instance_is_reported_not_ignored() -> None:
    """Libraries that wrap ``module.forward`` would hide the twin's, and the layer would silently stay in float."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    original = model[0].forward
    model[0].forward = lambda x: original(x)
    assert list(quantizable(model)) == ["1"]
    quantize(model, Plan((("*", W4),)), verbose=False)
    assert "replaced on the instance" in next(r.reason for r in report_layers(model) if r.name == "0")
    with pytest.raises(PlanError, match="'0' cannot be quantized: its forward was replaced"):
        quantize(model, Plan((("0", W4),)), verbose=False)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_new_type_is_a_mixin_with_a_forward_also_after_it_was_refused(by_name: bool) -> None:
    model = nn.Sequential(Doubled(2, 3))
    with pytest.raises(PlanError, match="overrides forward"):
        quantize(model, Plan((("0", W4),)), verbose=False)

    @quantizes(type_name(Doubled) if by_name else Doubled)
    class DoubledTwin(QuantizedLayer):
        input_axis = -1

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x, lambda x, w: 2 * torch.nn.functional.linear(x, w, self.bias))

    x = torch.randn(4, 2)
    want = model(x)
    quantize(model, Plan((("*", LayerPlan(weight=TensorPlan(8), input=TensorPlan(8))),)), verbose=False)
    assert isinstance(model[0], DoubledTwin) and isinstance(model[0], Doubled)
    torch.testing.assert_close(model(x), want, atol=0.05, rtol=0.05)
    assert torch.equal(dequantize(model)(x), want)


def test_a_type_that_does_not_tell_its_channels_is_a_named_error() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    @quantizes(Bare)
    class BareTwin(QuantizedLayer):
        def forward(self, x: Tensor) -> Tensor:
            return self.run(x, torch.matmul)

    with pytest.raises(QuantizationError, match="layer '0': Bare does not tell its number of input channels"):
        quantize(nn.Sequential(Bare()), Plan((("0", LayerPlan(input=TensorPlan(8, granularity="channel"))),)))


def test_parametrized_layers_are_quantized_and_never_taken_for_tied() -> None:
    """Their weight is another tensor on each access, so its id says nothing."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    for layer in model:
        nn.utils.parametrizations.weight_norm(layer)
    x = torch.randn(2, 4)
    want = model(x)
    quantize(model, Plan((("*", LayerPlan(weight=TensorPlan(8))),)), verbose=False)
    assert len({id(layer.weight_quantizer) for layer in model}) == 6
    torch.testing.assert_close(model(x), want, atol=0.05, rtol=0.05)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(dequantize(model)(x), want)


def test_a_lazy_layer_without_weights_is_a_named_error() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(QuantizationError, match="layer '0' has no weight yet: run a batch"):
        quantize(model, Plan((("*", W4),)), verbose=False)
    assert type(model[0]) is nn.LazyLinear
    model(torch.randn(2, 5))
    quantize(model, Plan((("*", W4),)), verbose=False)
    assert isinstance(model[0], QuantizedLayer)
