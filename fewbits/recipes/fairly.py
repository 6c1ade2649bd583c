"""Groups in a run: batches for importance, the loss that looks at groups, and what ``result.json`` tells of each."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import FairnessError, RecipeError
from fewbits.losses import GroupFairness
from fewbits.recipes.schema import Fairness, Recipe
from fewbits.recipes.task import Task
from fewbits.tasks.classification import predict
from fewbits.tasks.data import Indices, LabelledImages
from fewbits.tasks.group_metrics import fairlearn_metrics, group_changes, group_metrics, worst_change
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
            "manifest), or leave out fairness, the guard of the worst group, and plan.method fair"
        )
    groups: Tensor = examples.groups
    return groups


def check_groups(task: Task[Any], recipe: Recipe) -> None:
    """Raise RecipeError, before anything is trained, where a recipe asks for groups that its data do not have."""
    guard = recipe.evaluate.guard_worst_group is not None
    if guard or recipe.fairness is not None or recipe.plan.method == "fair":
        groups_of(task.test if guard else task.train)


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


def group_entry(task: Task[Any], original: nn.Module, model: nn.Module, batch_size: int) -> dict[str, Any] | None:
    """Return what ``result.json`` tells of groups: how float and quantized model serve each, and what each lost.

    None where the test examples have no groups.
    """
    test = task.test
    if getattr(test, "groups", None) is None:
        return None
    given = {"labels": test.labels, "groups": test.groups, "classes": len(test.classes), "names": test.group_names}
    answers = {
        name: predict(net, test, batch_size).argmax(1) for name, net in (("float", original), ("quantized", model))
    }
    forms = {name: group_metrics(answer, **given) for name, answer in answers.items()}
    right = {name: answer == test.labels for name, answer in answers.items()}
    changes = group_changes(right["float"], right["quantized"], test.groups, test.group_names)
    name, change = worst_change(changes)
    return {
        **forms,
        "fairlearn": {form: fairlearn_metrics(answer, **given) for form, answer in answers.items()},
        "changes": changes,
        "worst_change": {"group": name, "change": change},
        "verdict": verdict(changes),
    }


def verdict(changes: dict[str, dict[str, float]]) -> str:
    """Return in a sentence which group lost most, and how sure that is."""
    name, change = worst_change(changes)
    found = changes[name]
    if change >= 0:
        return "no group lost accuracy against float"
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
