from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from fewbits.errors import DataError
from fewbits.tasks.classification import cross_entropy, evaluate, predict, score
from fewbits.tasks.models import ReferenceCNN, build_model
from fewbits.tasks.sources import load


def test_score_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0], [5.0, 0.0, 1.0], [0.0, 0.0, 9.0]])
    result = score(logits, torch.tensor([0, 1, 2, 2]))
    assert result["top1"] == 75.0 and result["top5"] == 100.0
    assert result["confusion"] == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    expected = -torch.log_softmax(logits.double(), 1)[range(4), [0, 1, 2, 2]].mean()
    assert result["loss"] == pytest.approx(float(expected), rel=1e-6)


def test_score_agrees_with_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 12, generator=generator)
    labels = torch.randint(0, 12, (500,), generator=generator)
    result = score(logits, labels)
    for name, k in (("top1", 1), ("top5", 5)):
        reference = multiclass_accuracy(logits, labels, 12, average="micro", top_k=k)
        assert result[name] == pytest.approx(100 * float(reference), rel=1e-6)
    assert result["confusion"] == multiclass_confusion_matrix(logits, labels, 12).tolist()


def test_constant_logits_are_no_better_than_chance():
    assert score(torch.zeros(100, 10), torch.arange(100) % 10)["top1"] == 10.0


def test_nan_logits_are_named():
    logits = torch.zeros(6, 3)
    logits[4, 1] = torch.nan
    with pytest.raises(DataError, match="NaN for 1 examples, the first is 4"):
        score(logits, torch.zeros(6, dtype=torch.int64))


def test_cross_entropy_has_a_gradient_and_smooths():
    model, batch = ReferenceCNN(), load("digits").gather(range(8))
    loss = cross_entropy(model, batch)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    plain, smooth = cross_entropy(model, batch), cross_entropy(model, batch, label_smoothing=0.1)
    log_probabilities = model(batch[0]).log_softmax(1)
    torch.testing.assert_close(smooth, 0.9 * plain - 0.1 * log_probabilities.mean())


def test_predictions_are_those_of_eval_mode_in_order_for_any_batch_size(tiny):
    torch.manual_seed(0)
    model = ReferenceCNN(num_classes=4, in_channels=3)
    small, large = predict(model, tiny(), batch_size=7), predict(model, tiny(), batch_size=64)
    torch.testing.assert_close(small, large)
    torch.testing.assert_close(large, model.eval()(tiny().gather(range(40))[0]))
    assert not large.requires_grad


def test_the_mode_of_every_submodule_is_restored(tiny):
    model = ReferenceCNN(num_classes=4, in_channels=3)
    model.features[1].eval()
    modes = [m.training for m in model.modules()]
    evaluate(model, tiny())
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(DataError):
        evaluate(model, tiny(classes=tuple("abcde")))
    assert [m.training for m in model.modules()] == modes


def test_any_callable_is_evaluated(tiny):
    examples, seen = tiny(), []

    def oracle(images: Tensor) -> Tensor:
        seen.append(images)
        rows = torch.arange(len(images)) + sum(len(s) for s in seen[:-1])
        return torch.nn.functional.one_hot(examples.labels[rows], 4).float()

    assert evaluate(oracle, examples, batch_size=16)["top1"] == 100.0
    assert [len(s) for s in seen] == [16, 16, 8] and seen[0].dtype == torch.float32


def test_device_is_where_the_batches_go(tiny):
    devices = set()

    def record(images: Tensor) -> Tensor:
        devices.add(images.device.type)
        return torch.zeros(len(images), 4)

    evaluate(record, tiny(), device="meta")
    assert devices == {"meta"}


def test_wrong_number_of_classes(tiny):
    with pytest.raises(DataError, match=r"logits \[40, 10\] for 40 examples of 4 classes"):
        predict(ReferenceCNN(in_channels=3), tiny())


@pytest.mark.parametrize("run", [lambda m, e: evaluate(m, e), lambda m, e: cross_entropy(m, e.gather([0, 1]))])
def test_channel_mismatch(tiny, run):
    with pytest.raises(DataError, match="images have 3 channels, the model reads 1"):
        run(ReferenceCNN(num_classes=4), tiny())


def test_other_errors_of_the_model_pass_through(tiny):
    class Broken(ReferenceCNN):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(Broken(4, 3), tiny())


@pytest.mark.parametrize("output", [lambda x: (x, x), lambda x: x])
def test_outputs_that_are_no_logits(tiny, output):
    with pytest.raises(DataError, match=r"expected logits \[batch, classes\]"):
        evaluate(output, tiny())


def test_batch_size_below_one(tiny):
    with pytest.raises(DataError, match="batch_size must be at least 1, got 0"):
        evaluate(nn.Identity(), tiny(), batch_size=0)


def test_reference_cnn_learns_the_digits():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model, train = ReferenceCNN(), load("digits")
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=10 * 23)
    for _ in range(10):
        for rows in torch.randperm(len(train), generator=generator).split(64):
            loss = cross_entropy(model, train.gather(rows, generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    assert evaluate(model, load("digits", split="test"))["top1"] > 98


def test_public_resnet20_has_its_known_accuracy(shared):
    weights = shared / "weights_resnet_cifar10" / "resnet20-12fca82f.th"
    model = build_model("resnet20", 10, pretrained_path=weights)
    assert evaluate(model, load("cifar10", split="test"))["top1"] == pytest.approx(81.10, abs=0.1)
    lossless = evaluate(model, load("cifar10_lossless").subset(1000))
    assert lossless["top1"] > 99.5 and lossless["loss"] < 0.02
