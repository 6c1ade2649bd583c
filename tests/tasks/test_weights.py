from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

from fewbits.errors import CheckpointError
from fewbits.tasks.models import CifarResNet, ReferenceCNN
from fewbits.tasks.weights import load_cifar_resnet_checkpoint, load_weights


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "best_prec1": 91.5}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_torch_files(tmp_path, wrap, prefix):
    source, target = CifarResNet(8), CifarResNet(8)
    torch.save(wrap({prefix + k: v for k, v in source.state_dict().items()}), tmp_path / "w.th")
    assert not equal(source, target)
    load_cifar_resnet_checkpoint(target, tmp_path / "w.th")
    assert equal(source, target)


def test_safetensors_files(tmp_path):
    source, target = ReferenceCNN(), ReferenceCNN()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert equal(source, target)


def test_counters_of_old_files_may_be_missing(tmp_path):
    state = {k: v for k, v in ReferenceCNN().state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "w.pt")
    load_weights(ReferenceCNN(), tmp_path / "w.pt")


def test_differences_are_listed(tmp_path):
    state = ReferenceCNN().state_dict()
    state["extra"] = state.pop("classifier.bias")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"classifier\.bias is missing; extra is unknown to the model"):
        load_weights(ReferenceCNN(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"does not fit the model: .* and \d+ more"):
        load_weights(CifarResNet(8), tmp_path / "w.pt")


def test_a_refused_file_leaves_the_model_as_it_was(tmp_path):
    torch.save(ReferenceCNN(num_classes=5).state_dict(), tmp_path / "w.pt")
    model = ReferenceCNN()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_weights(model, tmp_path / "w.pt")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_skip_pattern_that_matches_nothing(tmp_path):
    torch.save(ReferenceCNN().state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"matches the pattern 'clasifier\.bias'; did you mean 'classifier\.b"):
        load_weights(ReferenceCNN(), tmp_path / "w.pt", skip=["clasifier.bias"])


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code of the file was run",)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps(Payload())])
def test_unreadable_files(tmp_path, name, content, capsys):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        load_weights(ReferenceCNN(), tmp_path / name)
    assert "was run" not in capsys.readouterr().out


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read the weights '.*nowhere\.pt'"):
        load_weights(ReferenceCNN(), tmp_path / "nowhere.pt")


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}])
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load_weights(ReferenceCNN(), tmp_path / "w.pt")
