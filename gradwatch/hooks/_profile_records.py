"""What a profile notes while it runs: one record a call, and the clock."""

from __future__ import annotations

from time import perf_counter_ns
from typing import Any

from torch import nn

from ..torchside import allocated_bytes, home, mark, wait_for

__all__ = ["Clock", "Record"]


class Record:
    """One call of one module: moments of its beginning and end, forward and backward."""

    __slots__ = (
        "activation_bytes",
        "backward_end",
        "backward_start",
        "backward_task",
        "depth",
        "forward_end",
        "forward_start",
        "input_storages",
        "is_recompute",
        "memory_after",
        "memory_before",
        "parent",
        "path",
        "thread",
    )

    def __init__(self, path: str, depth: int, is_recompute: bool, thread: int, parent: Record | None) -> None:
        self.path, self.depth, self.is_recompute, self.thread, self.parent = path, depth, is_recompute, thread, parent
        self.forward_start: Any = None
        self.forward_end: Any = None
        self.backward_start: Any = None
        self.backward_end: Any = None
        self.backward_task = -1
        self.input_storages: set[int] = set()
        self.activation_bytes = 0
        self.memory_before = self.memory_after = 0


class Clock:
    """Moments on the model's device: nanoseconds on the host where its events tell no time; else events, which are read
    only at the end."""

    def __init__(self, model: nn.Module) -> None:
        self.device = home(model.parameters())
        self.has_events = mark(self.device, timed=True) is not None
        self.zero = self.now()

    def now(self) -> Any:
        return mark(self.device, timed=True) if self.has_events else perf_counter_ns()

    def memory(self) -> int:
        """Return the bytes that torch has allocated on the device: a counter on the host."""
        return allocated_bytes(self.device)

    def wait(self) -> None:
        if self.has_events:
            wait_for(self.device)

    def microseconds(self, moment: Any) -> float:
        """Return the time of a moment since the clock was made."""
        if self.has_events:
            return float(self.zero.elapsed_time(moment)) * 1e3
        return float(moment - self.zero) / 1e3
