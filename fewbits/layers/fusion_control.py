"""The control loop over all fusion nodes of a model: once an optimizer step, after backward."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from fewbits.layers.fusion import fusion_nodes


def update_fusion(model: nn.Module, loss_scale: float = 1.0) -> None:
    """Move the gains of every node by the gradients since the last call: after the last backward of an optimizer step.

    Over accumulated batches the squared gradients add up; over processes they are averaged, so that all hold the same
    gains (every process must call). loss_scale: of a GradScaler, taken out so that energies of different steps can be
    averaged; where the scaled gradients overflowed, nothing changes.
    """
    nodes = list(fusion_nodes(model).values())
    if not nodes:
        return
    taken = [node.take_squares() for node in nodes]
    squares = torch.cat(taken) / loss_scale**2
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(squares)
        squares /= dist.get_world_size()
    for node, mine in zip(nodes, torch.split(squares, [len(t) for t in taken])):
        node.update(mine)


def freeze_fusion(model: nn.Module, frozen: bool = True) -> None:
    """Hold the gains of every controlled node as they are (or release them); energies are still measured."""
    for node in fusion_nodes(model).values():
        node.frozen = frozen


def fusion_numbers(model: nn.Module) -> dict[str, float]:
    """Return what to log: for each node the log ratio of energies, the gain of each branch, and steps at the clamp."""
    numbers: dict[str, float] = {}
    for name, node in fusion_nodes(model).items():
        numbers[f"fusion/{name}/log_ratio"] = node.log_ratio()
        gains = [float(g) for g in node.gains.detach()]
        numbers |= {f"fusion/{name}/gain_{branch}": gain for branch, gain in zip(node.branches, gains)}
        if node.settings.mode == "controller":
            numbers[f"fusion/{name}/clamped"] = float(node.clamped)
    return numbers
