"""Where a task's weight is multiplied into the one backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ._graph import task_entries

__all__ = ["weigh_entries", "weigh_losses"]


def weigh_losses(losses: Sequence[Tensor], weights: Sequence[float]) -> list[RemovableHandle]:
    """Multiply the gradient that arrives at each loss by its weight, everything upstream with it."""
    return [
        loss.register_hook(partial(torch.mul, other=weight))
        for loss, weight in zip(losses, weights, strict=True)
        if weight != 1
    ]


def weigh_entries(losses: Sequence[Tensor], weights: Sequence[float]) -> list[RemovableHandle]:
    """Multiply each task's gradient by its weight where it enters the shared part of the graph.

    A loss that is computed by one and the same operation as another's (entries of one tensor) has no part of its own,
    and is weighed itself.
    """
    if all(weight == 1 for weight in weights):
        return []
    handles: list[RemovableHandle] = []
    for loss, weight, entries in zip(losses, weights, task_entries(losses), strict=True):
        if weight == 1:
            continue
        if entries is None:
            handles += weigh_losses([loss], [weight])
            continue
        handles += [node.register_hook(_at_entries(positions, weight)) for node, positions in entries.items()]
    return handles


def _at_entries(positions: Sequence[int], weight: float) -> Callable[[Any, Any], Any]:
    def hook(grad_inputs: Sequence[Tensor | None], _: Any) -> tuple[Tensor | None, ...]:
        return tuple(g * weight if i in positions and g is not None else g for i, g in enumerate(grad_inputs))

    return hook
