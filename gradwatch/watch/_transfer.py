"""One packed copy from the device to the host per step, asynchronous where the device is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..stats import Number
from ..torchside import Mark, fetched, wide_dtype

__all__ = ["Known", "Numbers", "Parts", "Transfer"]

Parts = Mapping[str, Number]
_IS_CPU = attrgetter("is_cpu")
_AS_THEY_ARE = {torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}
"""What travels in the bits that it has, since the host reads them as the device does."""


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
        parts: name -> tensor of any shape, on one device or on several (each device gets one copy); or several 0-dim
            tensors of one device and dtype, that nobody had to put in one; or what the host knows already.
        then: told of the numbers once they are there, to add what follows from them.
    """

    def __init__(self, parts: Parts, then: Callable[[dict[str, Any]], None] | None = None) -> None:
        known: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        self._apart: dict[str, Sequence[Tensor]] = {}
        for name, value in parts.items():
            if isinstance(value, Tensor):
                tensors[name] = value
            elif isinstance(value, Sequence):
                self._apart[name], tensors[name] = value, value[0]
            else:
                known[name] = value
        self._known, self._then = known, then
        self._result: dict[str, Any] | None = None
        self._hosts: list[tuple[torch.device, list[str], Tensor]] = []
        self._dtypes: dict[torch.device, dict[str, Any]] = {}
        self._events: list[Mark] = []
        if all(map(_IS_CPU, tensors.values())):
            self._result = known
            tensors |= {name: torch.stack(list(several)) for name, several in self._apart.items()}
            known.update({name: _array(t) for name, t in tensors.items()})
            self._conclude(known)
            return
        by_device: dict[torch.device, list[str]] = {}
        for name, t in tensors.items():
            by_device.setdefault(t.device, []).append(name)
        self._shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        self._shapes |= {name: (len(several),) for name, several in self._apart.items()}
        for device, names in by_device.items():
            flat, self._dtypes[device] = self._packed(device, names, tensors)
            host, mark = fetched(flat)
            self._hosts.append((device, names, host))
            if mark is not None:
                self._events.append(mark)
        self._apart = {}

    def _packed(
        self, device: torch.device, names: list[str], tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the tensors of one device in a row, by one kernel, and of which kind each name's numbers are in it."""
        wide = wide_dtype(device)
        dtypes = {n: t.dtype if (t := tensors[n]).dtype in _AS_THEY_ARE else wide for n in names}
        if wide is not torch.float64 or set(dtypes.values()) == {wide}:
            dtypes = dict.fromkeys(names, wide)
        rows = [t.detach().to(dtypes[n]).reshape(-1) for n in names for t in self._apart.get(n, (tensors[n],))]
        kinds = {n: _AS_THEY_ARE[dtype] for n, dtype in dtypes.items()}
        if set(dtypes.values()) == {wide}:
            return (rows[0] if len(rows) == 1 else torch.cat(rows)), kinds
        rows = [row.view(torch.uint8) for row in rows]
        # Up to whole floats: whoever looks too early then finds none.
        short = -sum(map(len, rows)) % 8
        filler = next((row for row in rows if len(row) >= short), rows[0])[:short]
        flat = torch.cat([*rows, filler])
        return (flat if len(flat) % 8 else flat.view(torch.float64)), kinds

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
            found = dict(self._known)
            for device, names, host in self._hosts:
                flat, start = host.numpy().view(np.uint8), 0
                for name in names:
                    shape, kind = self._shapes[name], self._dtypes[device][name]
                    end = start + math.prod(shape) * np.dtype(kind).itemsize
                    # A copy: the host's pinned memory is not to be held as long as a record is.
                    numbers = flat[start:end].view(kind).astype(np.int64 if kind is np.int64 else np.float64)
                    found[name] = numbers.reshape(shape)
                    start = end
            self._conclude(found)
            self._result, self._hosts, self._events = found, [], []
        return self._result

    def _conclude(self, found: dict[str, Any]) -> None:
        if self._then is not None:
            self._then(found)


def _array(tensor: Tensor) -> NDArray[Any]:
    if tensor.dtype is torch.int64:
        return tensor.numpy()  # counts, which nobody changes; of many tensors they are large
    own = tensor.detach()
    wide = own.to(torch.float64)
    # A copy: treatments may go on to change norms in place.
    return wide.numpy().copy() if wide is own else wide.numpy()
