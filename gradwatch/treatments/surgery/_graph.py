"""What the tasks share, read from the autograd graph of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

__all__ = ["has_reentrant_checkpoint", "last_used", "reached_parameters", "shared_features", "task_entries"]


def last_used(losses: Sequence[Tensor], paths: Mapping[int, str], order: Sequence[str]) -> str:
    """Return the path, of those given, whose parameter the forward pass used last; ties go to the later in `order`.

    Args:
        losses: of the tasks.
        paths: parameter path by `id` of the parameter.
        order: all paths in order of registration.
    """
    rank = {path: position for position, path in enumerate(order)}
    best: tuple[int, int, str] | None = None
    for node in _walk([_edge(loss)[0] for loss in losses]):
        for child, _ in node.next_functions:
            path = paths.get(id(getattr(child, "variable", None)))
            if path is not None:
                here = (node._sequence_nr(), rank[path], path)
                best = here if best is None else max(best, here)
    return order[-1] if best is None else best[2]


def reached_parameters(losses: Sequence[Tensor]) -> list[set[int]]:
    """Return for each loss the `id` of every leaf tensor that its backward reaches."""
    leaves = []
    for loss in losses:
        variables = (getattr(node, "variable", None) for node in _walk([_edge(loss)[0]]))
        leaves.append({id(variable) for variable in variables if variable is not None})
    return leaves


def shared_features(losses: Sequence[Tensor]) -> list[GradientEdge]:
    """Return the tensors, nearest the losses, through which every task's gradient enters what all tasks share.

    An edge from a node that not all tasks reach into one that all do. One that lies upstream of another such tensor is
    left out: the gradient with respect to the later one says as much, and costs no pass through the shared part.
    """
    starts = [_edge(loss)[0] for loss in losses]
    reached = [_walk([start]) for start in starts]
    common = set(reached[0]).intersection(*map(set, reached[1:]))
    edges: dict[tuple[Any, int], None] = {}
    for nodes in reached:
        for node in nodes:
            if node not in common:
                edges.update(dict.fromkeys((c, nr) for c, nr in node.next_functions if c in common))
    upstream = set(_walk([child for node, _ in edges for child, _ in node.next_functions if child is not None]))
    return [GradientEdge(node, nr) for node, nr in edges if node not in upstream]


def task_entries(losses: Sequence[Tensor]) -> list[dict[Any, list[int]] | None]:
    """Return for each task the nodes of its own from which gradients enter what it shares with another task.

    Returns:
        One dict a task: node -> which of its inputs lead into shared nodes. None where the loss itself is shared.
    """
    starts = [_edge(loss)[0] for loss in losses]
    counts: dict[Any, int] = {}
    reached = [_walk([start]) for start in starts]
    for nodes in reached:
        for node in nodes:
            counts[node] = counts.get(node, 0) + 1
    result: list[dict[Any, list[int]] | None] = []
    for start, nodes in zip(starts, reached, strict=True):
        own = [node for node in nodes if counts[node] == 1]
        entries = {node: [i for i, (c, _) in enumerate(node.next_functions) if counts.get(c, 0) > 1] for node in own}
        result.append(None if counts[start] > 1 else {node: inputs for node, inputs in entries.items() if inputs})
    return result


def has_reentrant_checkpoint(losses: Sequence[Tensor]) -> bool:
    """Return whether a reentrantly checkpointed block lies in the graph, whose parameters it doesn't show."""
    return any(node.name() == "CheckpointFunctionBackward" for node in _walk([_edge(loss)[0] for loss in losses]))


def _edge(loss: Tensor) -> tuple[Any, int]:
    edge = get_gradient_edge(loss)
    return edge.node, edge.output_nr


def _walk(starts: Sequence[Any]) -> dict[Any, None]:
    """Return every node that backward would reach, starts included, in a fixed order."""
    seen: dict[Any, None] = dict.fromkeys(starts)
    stack = list(seen)
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None and child not in seen:
                seen[child] = None
                stack.append(child)
    return seen
