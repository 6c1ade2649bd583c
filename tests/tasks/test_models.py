from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from fewbits.errors import CheckpointError, RecipeError
from fewbits.tasks.models import CifarResNet, PaddedShortcut, ReferenceCNN, build_model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_reference_cnn_takes_any_size(shape):
    model = ReferenceCNN(num_classes=7, in_channels=shape[0])
    assert model(torch.rand(2, *shape)).shape == (2, 7)


def test_reference_cnn_is_small():
    assert 20_000 < parameters(ReferenceCNN()) < 60_000


@pytest.mark.parametrize(("depth", "convs", "count"), [(20, 19, 269_722), (56, 55, 853_018)])
def test_cifar_resnet_has_the_published_size(depth, convs, count):
    model = CifarResNet(depth)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convs
    assert parameters(model) == count
    assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_cifar_resnet_calls_each_relu_module_once():
    model, calls = CifarResNet(20), []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda m, args, out: calls.append(m))
    model(torch.rand(2, 3, 32, 32))
    assert len(calls) == len(set(calls)) == 19


def test_cifar_resnet_key_names():
    names = {n.removesuffix(".weight") for n in CifarResNet(20).state_dict() if n.endswith(".weight")}
    blocks = {f"layer{s}.{i}.{leaf}" for s in (1, 2, 3) for i in range(3) for leaf in ("conv1", "bn1", "conv2", "bn2")}
    assert names == {"conv1", "bn1", "linear"} | blocks


def test_padded_shortcut():
    x = torch.rand(2, 4, 6, 6)
    y = PaddedShortcut(4)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2]) and not y[:, :2].any() and not y[:, 6:].any()


@pytest.mark.parametrize("depth", [2, 21])
def test_impossible_depth(depth):
    with pytest.raises(RecipeError, match=rf"depth of 6n \+ 2 .* got {depth}"):
        CifarResNet(depth)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("reference_cnn", (1, 8, 8)),
        ("resnet20", (3, 32, 32)),
        ("torchvision:mobilenet_v3_small", (3, 32, 32)),
        ("torchvision:resnet18", (1, 32, 32)),
        ("torchvision:squeezenet1_1", (4, 32, 32)),
    ],
)
def test_build_by_name(name, shape):
    model = build_model(name, num_classes=6, in_channels=shape[0]).eval()
    assert model(torch.rand(2, *shape)).shape == (2, 6)


def test_build_timm_model():
    pytest.importorskip("timm")
    model = build_model("timm:resnet10t", num_classes=6, in_channels=2).eval()
    assert model(torch.rand(1, 2, 32, 32)).shape == (1, 6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet21", "'resnet21' is not among fewbits' own models; did you mean .*'resnet20'"),
        ("torchvision:resnet19", "'resnet19' is not among torchvision's classifiers; did you mean 'resnet1"),
        ("torchvision:fasterrcnn_resnet50_fpn", "is not among torchvision's classifiers"),
        ("timn:resnet18", "unknown model library 'timn'"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(RecipeError, match=message):
        build_model(name, 10)


@pytest.mark.parametrize("name", ["resnet19x", "hf-hub:somebody/something"])
def test_unknown_timm_names(name):
    pytest.importorskip("timm")
    with pytest.raises(RecipeError, match=f"'{name}' is not among timm's models"):
        build_model(f"timm:{name}", 10)


def test_missing_timm_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RecipeError, match=r"pip install 'fewbits\[models\]'"):
        build_model("timm:resnet10t", 10)


@pytest.mark.parametrize("options", [{"depth_of_field": 3}, {"num_class": 4}])
def test_unknown_option(options):
    with pytest.raises(RecipeError, match="does not take the options"):
        build_model("reference_cnn", 10, **options)


def test_weights_are_never_downloaded():
    with pytest.raises(RecipeError, match="does not take the options"):
        build_model("torchvision:resnet18", 10, weights="DEFAULT")


@pytest.mark.parametrize(("classes", "channels"), [(1, 3), (10, 0)])
def test_impossible_shape(classes, channels):
    with pytest.raises(RecipeError, match="num_classes >= 2 and in_channels >= 1"):
        build_model("reference_cnn", classes, channels)


def test_pretrained_weights_without_the_head(tmp_path):
    torch.manual_seed(0)
    old = ReferenceCNN(num_classes=5)
    torch.save(old.state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"classifier.bias is \[5\] in the file and \[10\] in the model"):
        build_model("reference_cnn", 10, 1, tmp_path / "w.pt")
    new = build_model("reference_cnn", 10, 1, tmp_path / "w.pt", pretrained_skip=["classifier.*"])
    assert torch.equal(new.features[0].weight, old.features[0].weight)


def test_skip_without_a_checkpoint():
    with pytest.raises(RecipeError, match="without pretrained_path"):
        build_model("reference_cnn", 10, pretrained_skip=["classifier.*"])
