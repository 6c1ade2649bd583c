"""The search of a recipe: its functions that train and measure, and what the report shows of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits.allocate import Budget, SearchResult, Style, sigma_search
from fewbits.cost import Hardware, ModelShape, hardware_cost, plan_cycles
from fewbits.plan import Plan
from fewbits.recipes.planning import STYLE, completion, needs_loss, told
from fewbits.recipes.schema import Recipe
from fewbits.recipes.task import Task
from fewbits.train import Batches, fit


def search(model: nn.Module, recipe: Recipe, task: Task[Any], folder: Path, say: Callable[[str], None]) -> SearchResult:
    """Search the plan of a recipe from a float model; goes on with the search in ``folder`` if one is there.

    It trains on the training examples and measures on the validation examples; test examples are for later.
    """
    rules, validation, given = recipe.search, task.validation, recipe.plan
    assert rules is not None and validation is not None and recipe.budget is not None  # schema and load_task saw to it
    loss, size = task.loss(rules.label_smoothing), recipe.evaluate.batch_size

    def finetune(model: nn.Module, epochs: int) -> None:
        seed = int(torch.randint(2**31, ()))  # the search seeds each step, so this is the same when it is resumed
        length = {"epochs": epochs} if rules.steps_per_epoch is None else {"max_steps": epochs * rules.steps_per_epoch}
        fit(
            model,
            Batches(task.train, rules.batch_size, seed=seed),
            loss,
            rules.config(seed, progress=False, **length),
            stage="search",
        )
        model.cpu()

    cuda = rules.accelerator in ("auto", "cuda") and torch.cuda.is_available()

    def evaluate(model: nn.Module) -> float:
        model.to("cuda" if cuda else "cpu")
        try:
            return float(task.evaluate(model, validation, size)[task.accuracy])
        finally:
            model.cpu()  # where the calibration batches are

    example, data = task.sample(1), dict[str, Any]()
    if needs_loss(given.method):
        data = {"loss": task.loss(), "batches": list(task.sensitivity(recipe))}
    found = sigma_search(
        model,
        Budget(**recipe.budget.model_dump()),
        finetune,
        evaluate,
        [part for inputs in task.calibration(recipe) for part in inputs.chunk(-(-len(inputs) // size))],
        example=example,
        menu=given.menu,
        style=Style(**given.model_dump(include=set(STYLE))),
        complete=completion(model, recipe, example),
        state=folder,
        say=say,
        seed=recipe.seed,
        **data,
        **rules.settings(),
        **given.options,
    )
    return replace(found, plan=told(found.plan, recipe))


def search_entry(found: SearchResult) -> dict[str, Any]:
    """Return what ``result.json`` holds of a search."""
    log, mode = found.log, found.log["settings"]["kl"]
    floor = {} if log["targets"]["floor"] is None else {"accuracy": log["targets"]["floor"]}
    limits = {name: limit for name, limit in log["targets"].items() if name in log["buffers"] and name != "accuracy"}
    return {
        "status": found.status,
        "message": found.message,
        "missed": found.missed,
        "steps": len(log["steps"]),
        "epochs": log["epochs"],
        "seconds": log["seconds"],
        "settings": log["settings"],
        "accuracies": log["accuracies"],
        "reference": {"accuracy": log["accuracies"]["int8"], "costs": log["int8_costs"]},
        "targets": {**limits, **floor},
        "buffers": log["buffers"],
        "layers": [
            {"name": i["layer"], "sigma": i["sigma"], "kl": i["divergence"][mode], "cluster": i["cluster"]}
            for i in log["items"]
            if i["kind"] == "weight"
        ],
        "log": [
            {
                **entry,
                "moved": [f"{name} {a} to {b}" for name, a, b in entry["moved"]],
                "status": entry["status"] or "",
            }
            for entry in log["steps"]
        ],
    }


def hardware_entry(name: str, plan: Plan, model: nn.Module, shape: ModelShape) -> dict[str, Any]:
    """Return what ``result.json`` holds of the hardware of the budget: the trained model on it, layer by layer."""
    hardware = Hardware.load(name)
    cycles = plan_cycles(model, plan) if hardware.measures_cycles else None
    cost = hardware_cost(plan, shape, hardware, cycles)
    layers = [
        {
            "name": row.name,
            "cycles": None if row.cycles is None else row.cycles / max(row.macs, 1),
            "compute_energy_uj": row.compute_energy,
            "memory_energy_uj": row.memory_energy,
            "latency_ms": row.latency,
        }
        for row in cost.layers
    ]
    return {
        "name": name,
        "energy_uj": cost.compute_energy + cost.memory_energy,
        "latency_ms": cost.latency,
        "energy_ratio": cost.energy_ratio,
        "latency_ratio": cost.latency_ratio,
        "layers": layers,
    }
