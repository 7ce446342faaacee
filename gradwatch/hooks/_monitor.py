"""Running statistics of what passes hook points, by sums that merge."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnknownNameError
from ._functions import Observer
from ._points import Point

if TYPE_CHECKING:
    from ._hook import Hook

__all__ = ["Monitor", "Statistics"]

NUM_SUMS = 5


@dataclass(frozen=True)
class Statistics:
    """What passed one point, over all calls so far. Non-finite values are not filtered: they show in every moment.

    Attributes:
        count: elements.
        calls: tensors.
        mean: of the elements.
        std: population standard deviation.
        rms: root of the mean square.
        absmax: largest magnitude; nan if any element is nan.
        zero_fraction: share of exact zeros.
        nonfinite: number of nan and inf.
    """

    count: int
    calls: int
    mean: float
    std: float
    rms: float
    absmax: float
    zero_fraction: float
    nonfinite: int


class _Sums:
    """Sums of one point on one device: float64 (5,) of count, sum, squares, zeros, non-finite; and the largest."""

    __slots__ = ("calls", "largest", "sums")

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=device)
        self.largest = torch.zeros((), dtype=torch.float64, device=device)
        self.calls = 0

    def add(self, tensor: Tensor) -> None:
        """Take in a tensor; reads nothing back from the device."""
        self.calls += 1
        if tensor.numel() == 0:
            return
        dense = tensor.coalesce().values() if tensor.is_sparse else tensor
        flat = (dense.abs() if dense.is_complex() else dense).reshape(-1).to(torch.float64)
        size = torch.full((), float(flat.numel()), dtype=torch.float64, device=flat.device)
        zeros, bad = (flat == 0).sum(), (~torch.isfinite(flat)).sum()
        self.sums += torch.stack([size, flat.sum(), flat.dot(flat), zeros.double(), bad.double()])
        self.largest = torch.maximum(self.largest, flat.abs().max())  # propagates nan

    def merged(self, other: _Sums) -> _Sums:
        both = _Sums(self.sums.device)
        both.sums = self.sums + other.sums.to(self.sums.device)
        both.largest = torch.maximum(self.largest, other.largest.to(self.largest.device))
        both.calls = self.calls + other.calls
        return both

    def read(self) -> Statistics:
        """Return the statistics: the one host read."""
        count, total, squares, zeros, bad, largest = torch.cat([self.sums, self.largest.reshape(1)]).tolist()
        if count == 0:
            nan = float("nan")
            return Statistics(0, self.calls, nan, nan, nan, nan, nan, 0)
        mean, square = total / count, squares / count
        variance = square - mean * mean
        std = variance if math.isnan(variance) else max(variance, 0.0) ** 0.5
        return Statistics(int(count), self.calls, mean, std, square**0.5, largest, zeros / count, int(bad))


class Monitor(Observer, Mapping[str, Statistics]):
    """Running statistics by point; nested outputs by point and leaf: `lstm:output[1.0]`.

    Nothing is read back from the device until a number is asked for.

    Attributes:
        hook: that feeds it.
    """

    def __init__(self) -> None:
        super().__init__(kind="monitor")
        self.hook: Hook
        self._sums: dict[str, _Sums] = {}
        self._lock = threading.Lock()

    def observe(self, tensor: Tensor, point: Point) -> None:
        name = f"{point.name}[{point.leaf}]" if point.leaf else point.name
        with self._lock:
            sums = self._sums.get(name)
            if sums is None or sums.sums.device != tensor.device:
                fresh = _Sums(tensor.device)
                sums = self._sums[name] = fresh if sums is None else fresh.merged(sums)
            sums.add(tensor)

    def reset(self) -> None:
        with self._lock:
            self._sums.clear()

    def merge(self, other: Monitor) -> Monitor:
        """Return the statistics of both together, as if one had seen everything: of two runs, or two ranks."""
        both = Monitor()
        both._sums = dict(self._sums)
        for name, sums in other._sums.items():
            both._sums[name] = both._sums[name].merged(sums) if name in both._sums else sums
        return both

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as plain values, to send to another process."""
        return {n: [s.calls, s.largest.item(), *s.sums.tolist()] for n, s in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = {}
        for name, (calls, largest, *sums) in state.items():
            loaded = self._sums[name] = _Sums(torch.device("cpu"))
            loaded.calls = calls
            loaded.largest = torch.tensor(largest, dtype=torch.float64)
            loaded.sums = torch.tensor(sums, dtype=torch.float64)

    def __getitem__(self, name: str) -> Statistics:
        if name not in self._sums:
            raise UnknownNameError("monitored point that has fired", name, self._sums)
        return self._sums[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._sums))

    def __len__(self) -> int:
        return len(self._sums)

    def __contains__(self, name: object) -> bool:
        return name in self._sums

    def table(self) -> str:
        """Return all statistics as text, one point a line."""
        width = max(map(len, self._sums), default=5)
        columns = ("calls", "mean", "std", "rms", "absmax", "zeros", "nonfinite")
        lines = [f"{'point':{width}} " + " ".join(f"{c:>10}" for c in columns)]
        for name, s in self.items():
            moments = " ".join(f"{x:10.3g}" for x in (s.mean, s.std, s.rms, s.absmax))
            lines.append(f"{name:{width}} {s.calls:10d} {moments} {s.zero_fraction:10.1%} {s.nonfinite:10d}")
        return "\n".join(lines)
