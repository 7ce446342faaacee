"""Where in a backward pass this thread is."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["graph_task_id", "in_backward"]

# Not -1 while a backward pass runs in this thread: a module that is called then is being recomputed. Private, so
# where it is missing no thread ever counts as inside one.
graph_task_id: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def in_backward() -> bool:
    """Return whether this thread runs inside a backward pass."""
    return graph_task_id() != -1
