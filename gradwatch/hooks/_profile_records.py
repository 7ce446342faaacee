"""What a profile notes while it runs: one record a call, and the clock."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

__all__ = ["Clock", "Record"]


class Record:
    """One call of one module: moments of its beginning and end, forward and backward."""

    __slots__ = (
        "activation_bytes",
        "backward_end",
        "backward_start",
        "depth",
        "forward_end",
        "forward_start",
        "has_grad_input",
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
        self.has_grad_input = False
        self.input_storages: set[int] = set()
        self.activation_bytes = 0
        self.memory_before = self.memory_after = 0


class Clock:
    """Moments on the model's device: nanoseconds on the CPU, events on CUDA, which are read only at the end."""

    def __init__(self, model: nn.Module) -> None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.is_cuda = device.type == "cuda"
        self.device = device
        self.zero = self.now()

    def now(self) -> Any:
        if not self.is_cuda:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def memory(self) -> int:
        """Return the bytes that torch has allocated on the device: a counter on the host."""
        return torch.cuda.memory_allocated(self.device) if self.is_cuda else 0

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def microseconds(self, moment: Any) -> float:
        """Return the time of a moment since the clock was made."""
        if self.is_cuda:
            return float(self.zero.elapsed_time(moment)) * 1e3
        return float(moment - self.zero) / 1e3
