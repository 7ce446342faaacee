"""One packed copy from the device to the host per step, asynchronous where the device is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Transfer"]


class Transfer:
    """Named float64 tensors on their way to the host, in one copy.

    On the CPU the numbers are there at once. On CUDA the copy goes into pinned memory without a wait, and `ready`
    tells when it has arrived; `result()` before that waits.

    Args:
        parts: name -> tensor of any shape, all on one device or on several (each device gets one copy).
    """

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        self._shapes = {name: tuple(t.shape) for name, t in parts.items()}
        self._result: dict[str, NDArray[np.float64]] | None = None
        self._hosts: list[tuple[list[str], Tensor]] = []
        self._events: list[torch.cuda.Event] = []
        by_device: dict[torch.device, list[str]] = {}
        for name, t in parts.items():
            by_device.setdefault(t.device, []).append(name)
        if set(by_device) <= {torch.device("cpu")}:
            # A copy: treatments go on to change norms in place.
            self._result = {name: t.detach().to(torch.float64).numpy().copy() for name, t in parts.items()}
            return
        for device, names in by_device.items():
            packed = torch.cat([parts[n].detach().to(torch.float64).reshape(-1) for n in names])
            if device.type != "cuda":
                self._hosts.append((names, packed.cpu()))
                continue
            host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            host.copy_(packed, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._hosts.append((names, host))
            self._events.append(event)

    @property
    def ready(self) -> bool:
        """Whether `result()` returns without a wait."""
        return self._result is not None or all(event.query() for event in self._events)

    def result(self) -> dict[str, NDArray[np.float64]]:
        """Return the numbers by name, in their tensors' shapes."""
        if self._result is None:
            for event in self._events:
                event.synchronize()
            self._result = {}
            for names, host in self._hosts:
                flat, start = host.numpy(), 0
                for name in names:
                    shape = self._shapes[name]
                    size = int(np.prod(shape))
                    self._result[name] = flat[start : start + size].reshape(shape)
                    start += size
            self._hosts, self._events = [], []
        return self._result
