"""Groups in a run: batches for importance, the loss that looks at groups, and what ``result.json`` tells of each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import DataError, FairnessError, RecipeError
from fewbits.losses import GroupFairness
from fewbits.recipes.schema import Evaluate, Fairness, Recipe
from fewbits.recipes.task import Task
from fewbits.tasks.classification import predict
from fewbits.tasks.data import Indices, LabelledImages
from fewbits.tasks.group_metrics import fairlearn_metrics, group_changes, group_metrics, worst_change
from fewbits.tasks.image_groups import image_groups
from fewbits.train.loop import Loss

IMPORTANCE_BATCH = 32


@dataclass(frozen=True)
class WithGroups:
    """Images whose batches are (images, labels, groups), and hold each group at its share."""

    images: LabelledImages

    def __len__(self) -> int:
        return len(self.images)

    @property
    def batch_strata(self) -> Tensor:
        """See ``fewbits.train.Batches``."""
        return groups_of(self.images)

    def gather(self, indices: Indices, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return images, labels and groups."""
        images, labels = self.images.gather(indices, generator)
        return images, labels, groups_of(self.images)[torch.as_tensor(indices)]


def groups_of(examples: Any) -> Tensor:
    """Return the groups of examples. Raises RecipeError where they have none."""
    if getattr(examples, "groups", None) is None:
        raise RecipeError(
            "these data have no groups: take a source with groups (digits_groups, cifar10_groups, isic2017, nih_cxr64, "
            "manifest; for boxes and masks, a table in evaluate.groups), or leave out fairness, the guard of the worst "
            "group, and plan.method fair"
        )
    groups: Tensor = examples.groups
    return groups


def check_groups(task: Task[Any], recipe: Recipe) -> None:
    """Raise RecipeError, before anything is trained, where a recipe asks for groups that its data do not have."""
    if recipe.evaluate.groups is not None:
        groups_of_images(task, recipe.evaluate.groups)
    elif recipe.evaluate.guard_worst_group is not None:
        groups_of(task.test)
    if recipe.fairness is not None or recipe.plan.method == "fair":
        groups_of(task.train)


def groups_of_images(task: Task[Any], file: str) -> tuple[Tensor, tuple[str, ...]]:
    """Return the groups of the test images by a table, and their names. Raises RecipeError, DataError."""
    if not getattr(task.test, "names", ()):
        raise RecipeError(
            "evaluate.groups is a table of images for detection and segmentation; in classification, groups come with "
            "the data (source manifest: columns of its table), and texts have none"
        )
    return image_groups(Path(file).expanduser(), task.test.names)


def group_batches(task: Task[Any], recipe: Recipe) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return batches of each group alone, for its importance: ``evaluate.group_examples`` of each, not augmented.

    Warns of a group that has fewer, with the count. Raises RecipeError for one that has none.
    """
    train, wanted, found = task.train, recipe.evaluate.group_examples, {}
    groups = groups_of(train)
    for index, name in enumerate(train.group_names):
        rows = (groups == index).nonzero().flatten()
        if not len(rows):
            raise RecipeError(f"group {name!r} has no training example: its importance cannot be measured")
        if len(rows) < wanted:
            warnings.warn(f"group {name!r} has {len(rows)} training examples, of {wanted} wanted", stacklevel=2)
        members = train.select(rows)
        chosen = members if len(rows) <= wanted else members.subset(wanted, recipe.seed)
        found[name] = list(chosen.batches(IMPORTANCE_BATCH))
    return found


def fairness_of(task: Task[Any], rules: Fairness) -> GroupFairness:
    """Return the term of a task's training examples."""
    groups, names = groups_of(task.train), task.train.group_names
    known = groups[groups >= 0]
    shares = {name: float((known == i).float().mean()) for i, name in enumerate(names)}
    return GroupFairness(names, rules.mode, rules.weight, least=rules.least, shares=shares)


def fair_loss(fairness: GroupFairness, label_smoothing: float) -> Loss:
    """Return the mean cross entropy of (images, labels, groups), plus the term."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, labels, groups = batch
        each = F.cross_entropy(model(images), labels, reduction="none", label_smoothing=label_smoothing)
        return each.mean() + fairness(each, groups)

    return loss


def group_entry(task: Task[Any], original: nn.Module, model: nn.Module, rules: Evaluate) -> dict[str, Any] | None:
    """Return what ``result.json`` tells of groups: how float and quantized model serve each, and what each lost.

    None where the test examples have no groups.
    """
    nets = {"float": original, "quantized": model}
    if rules.groups is not None:
        found = _of_images(task, nets, rules.groups, rules.batch_size)
    elif getattr(task.test, "groups", None) is not None:
        found = _of_classifier(task, nets, rules.batch_size)
    else:
        return None
    changes = found["changes"]
    name, change = worst_change(changes)
    return {**found, "worst_change": {"group": name, "change": change}, "verdict": verdict(changes)}


def _of_classifier(task: Task[Any], nets: Mapping[str, nn.Module], batch_size: int) -> dict[str, Any]:
    """Return accuracy, gaps and odds of a classifier by group."""
    test = task.test
    given = {"labels": test.labels, "groups": test.groups, "classes": len(test.classes), "names": test.group_names}
    answers = {name: predict(net, test, batch_size).argmax(1) for name, net in nets.items()}
    right = {name: answer == test.labels for name, answer in answers.items()}
    return {
        **{name: group_metrics(answer, **given) for name, answer in answers.items()},
        "fairlearn": {form: fairlearn_metrics(answer, **given) for form, answer in answers.items()},
        "changes": group_changes(right["float"], right["quantized"], test.groups, test.group_names),
    }


def _of_images(task: Task[Any], nets: Mapping[str, nn.Module], file: str, batch_size: int) -> dict[str, Any]:
    """Return the task's metric of each group of images; it is no mean over images, so changes have no interval."""
    groups, names = groups_of_images(task, file)
    parts = {name: task.test.select((groups == i).nonzero().flatten()) for i, name in enumerate(names)}
    found: dict[str, Any] = {"metric": task.accuracy}
    for form, net in nets.items():
        measured = {name: task.evaluate(net, part, batch_size)[task.accuracy] for name, part in parts.items()}
        served = {name: float(value) for name, value in measured.items() if value is not None}
        if not served:
            raise DataError(f"{file}: no group of test images has an object, so there is nothing to measure by group")
        worst = min(served, key=lambda name: served[name])
        found[form] = {
            "acc_groups": served,
            "acc_group_mean": sum(served.values()) / len(served),
            "acc_worst": served[worst],
            "worst": worst,
            "acc_gap": max(served.values()) - served[worst],
            "counts": {name: [len(part)] for name, part in parts.items()},
        }
    before, after = (found[form]["acc_groups"] for form in nets)
    found["changes"] = {name: {"change": after[name] - before[name]} for name in after}
    return found


def verdict(changes: dict[str, dict[str, float]]) -> str:
    """Return in a sentence which group lost most, and how sure that is."""
    name, change = worst_change(changes)
    found = changes[name]
    if change >= 0:
        return "no group lost accuracy against float"
    if "high" not in found:
        return f"group {name!r} loses most, {-change:.1f} points"
    sure = "" if found["high"] < 0 else ", which may be chance"
    return f"group {name!r} loses most, {-change:.1f} points ({-found['high']:.1f} to {-found['low']:.1f}){sure}"


def require_fair(result: dict[str, Any], limit: float | None) -> None:
    """Raise FairnessError, naming the group, where one lost more points than the limit."""
    if limit is None:
        return
    groups = result["groups"]
    name, change = groups["worst_change"]["group"], groups["worst_change"]["change"]
    if -change > limit:
        raise FairnessError(
            f"group {name!r} lost {-change:.2f} points of accuracy against float, more than the {limit:g} allowed: "
            "give more bits, plan by importance for groups (plan.method: fair), or train with a section fairness"
        )
