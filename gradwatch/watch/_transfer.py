"""One packed copy from the device to the host per step, asynchronous where the device is."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..torchside import Mark, fetched, wide_dtype

__all__ = ["Known", "Numbers", "Transfer"]

_IS_CPU = attrgetter("is_cpu")


class Numbers(Protocol):
    """Numbers by name that have arrived on the host, or will."""

    @property
    def ready(self) -> bool:
        """Whether `result()` returns without a wait."""

    def result(self) -> dict[str, Any]:
        """Return the numbers by name: float64 arrays, or plain numbers."""


class Known:
    """Numbers that the host has found itself."""

    __slots__ = ("_found",)
    ready = True

    def __init__(self, found: dict[str, Any]) -> None:
        self._found = found

    def result(self) -> dict[str, Any]:
        return self._found


class Transfer:
    """Named numbers on their way to the host, in float64 and in one copy.

    On the CPU the numbers are there at once. On a device the copy goes into pinned memory without a wait, and `ready`
    tells when it has arrived; `result()` before that waits. Where a device has no pinned memory or no events
    (see `fetched`), it is waited for at once.

    Args:
        parts: name -> tensor of any shape, on one device or on several (each device gets one copy); or a number that
            the host knows already.
    """

    def __init__(self, parts: Mapping[str, Tensor | float]) -> None:
        known: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, value in parts.items():
            if isinstance(value, Tensor):
                tensors[name] = value
            else:
                known[name] = value
        self._known = known
        self._result: dict[str, Any] | None = None
        self._hosts: list[tuple[list[str], Tensor]] = []
        self._events: list[Mark] = []
        if all(map(_IS_CPU, tensors.values())):
            self._result = known
            known.update({name: _array(t) for name, t in tensors.items()})
            return
        by_device: dict[torch.device, list[str]] = {}
        for name, t in tensors.items():
            by_device.setdefault(t.device, []).append(name)
        self._shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        for device, names in by_device.items():
            wide = wide_dtype(device)
            host, mark = fetched(torch.cat([tensors[n].detach().to(wide).reshape(-1) for n in names]))
            self._hosts.append((names, host))
            if mark is not None:
                self._events.append(mark)

    @property
    def ready(self) -> bool:
        """Whether `result()` returns without a wait."""
        return self._result is not None or all(event.query() for event in self._events)

    def result(self) -> dict[str, Any]:
        """Return the numbers by name: float64 arrays of their tensors' shapes (counts may be int64), or plain numbers
        as they were given."""
        if self._result is None:
            for event in self._events:
                event.synchronize()
            self._result = dict(self._known)
            for names, host in self._hosts:
                flat, start = host.to(torch.float64).numpy(), 0
                for name in names:
                    shape = self._shapes[name]
                    size = int(np.prod(shape))
                    self._result[name] = flat[start : start + size].reshape(shape)
                    start += size
            self._hosts, self._events = [], []
        return self._result


def _array(tensor: Tensor) -> NDArray[Any]:
    if tensor.dtype is torch.int64:
        return tensor.numpy()  # counts, which nobody changes; of many tensors they are large
    own = tensor.detach()
    wide = own.to(torch.float64)
    # A copy: treatments may go on to change norms in place.
    return wide.numpy().copy() if wide is own else wide.numpy()
