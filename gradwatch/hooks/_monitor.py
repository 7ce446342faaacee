"""Running statistics of what passes hook points, by sums that merge."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._warn import warn
from ..errors import ConfigError, UnknownNameError, UnreadableError
from ..torchside import Values, in_transform, moved, values, wide_dtype
from ._functions import Observer
from ._points import Point

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._hook import Hook

__all__ = ["Monitor", "Statistics"]

NUM_SUMS = 6
Metric = Callable[[Tensor], Any]


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
        metrics: means over the calls of one's own measures.
    """

    count: int
    calls: int
    mean: float
    std: float
    rms: float
    absmax: float
    zero_fraction: float
    nonfinite: int
    metrics: Mapping[str, float] = field(default_factory=dict)


def readable(tensor: Tensor) -> Values:
    """Return the elements of a tensor of any kind, complex ones by their magnitude.

    Raises:
        UnreadableError: nothing here can read it; under `vmap` and other transforms no number is there yet.
    """
    if in_transform():
        raise UnreadableError("inside a function transform (vmap, grad) a tensor's own numbers are out of reach")
    return values(tensor.detach().abs() if tensor.is_complex() else tensor)


def _spread(sums: Tensor, other: Tensor) -> Tensor:
    """Return the squared deviations from the common mean that two parts have beyond those from their own."""
    n, m = sums[0], other[0]
    delta = other[1] / m.clamp(min=1) - sums[1] / n.clamp(min=1)
    both = delta.square() * n * m / (n + m).clamp(min=1)
    return torch.where((n == 0) | (m == 0), torch.zeros_like(both), both)


class _Sums:
    """Sums of one point on one device: (6,) of count, sum, squares, zeros, non-finite, squared deviations from the mean
    (which the squares do not give where the mean is large); and the largest."""

    __slots__ = ("calls", "largest", "metrics", "sums")

    def __init__(self, device: torch.device) -> None:
        wide = wide_dtype(device)
        self.sums = torch.zeros(NUM_SUMS, dtype=wide, device=device)
        self.largest = torch.zeros((), dtype=wide, device=device)
        self.calls = 0
        self.metrics: dict[str, Tensor] = {}

    def add(self, tensor: Tensor, metrics: Mapping[str, Metric]) -> None:
        """Take in a tensor; reads nothing back from the device."""
        piece, num_implied = readable(tensor)
        for name, metric in metrics.items():
            value = torch.as_tensor(metric(tensor), dtype=self.sums.dtype, device=self.sums.device)
            self.metrics[name] = self.metrics.get(name, torch.zeros_like(value)) + value
        self.calls += 1
        if tensor.numel() == 0:
            return
        wide = self.sums.dtype
        flat = piece.reshape(-1).to(wide)
        size = torch.full((), float(flat.numel() + num_implied), dtype=wide, device=flat.device)
        total = flat.sum()
        mean = total / size
        zeros, bad = (flat == 0).sum() + num_implied, (~torch.isfinite(flat)).sum()
        apart = (flat - mean).square().sum() + num_implied * mean.square()
        new = torch.stack([size, total, flat.dot(flat), zeros.to(wide), bad.to(wide), apart])
        new[5] += _spread(self.sums, new)
        self.sums += new
        if flat.numel():
            self.largest = torch.maximum(self.largest, flat.abs().max())  # propagates nan

    def merged(self, other: _Sums) -> _Sums:
        both = _Sums(self.sums.device)
        there = moved(other.sums, self.sums.device, self.sums.dtype)
        both.sums = self.sums + there
        both.sums[5] += _spread(self.sums, there)
        for name in {**self.metrics, **other.metrics}:
            parts = [s.metrics[name] for s in (self, other) if name in s.metrics]
            both.metrics[name] = sum((moved(p, self.sums.device, self.sums.dtype) for p in parts[1:]), parts[0])
        both.largest = torch.maximum(self.largest, moved(other.largest, self.largest.device, self.largest.dtype))
        both.calls = self.calls + other.calls
        return both

    def read(self) -> Statistics:
        """Return the statistics: the one host read."""
        names = list(self.metrics)
        held = torch.cat([self.sums, self.largest.reshape(1), *(self.metrics[n].reshape(1) for n in names)]).tolist()
        count, total, squares, zeros, bad, apart, largest = held[: NUM_SUMS + 1]
        own = {name: value / max(self.calls, 1) for name, value in zip(names, held[NUM_SUMS + 1 :], strict=True)}
        if count == 0:
            nan = float("nan")
            return Statistics(0, self.calls, nan, nan, nan, nan, nan, 0, own)
        mean, variance = total / count, apart / count
        std = variance if math.isnan(variance) else max(variance, 0.0) ** 0.5
        rms = (squares / count) ** 0.5
        return Statistics(int(count), self.calls, mean, std, rms, largest, zeros / count, int(bad), own)


class Monitor(Observer, Mapping[str, Statistics]):
    """Running statistics by point; nested outputs by point and leaf: `lstm:output[1.0]`.

    Nothing is read back from the device until a number is asked for. Tensors of any kind are read (sparse, nested,
    quantised, float8); what can't be (inside `vmap`) is left out, named in `skipped` and said once.

    Args:
        metrics: measures of one's own by name, each a function of the tensor that gives a number (or a tensor of one).
        history: of how many steps back the statistics are kept apart too, for `over_time`.

    Attributes:
        hook: that feeds it; `with hooks.monitor(...) as monitor:` takes it off at the end.
        skipped: why tensors at a point were left out.
    """

    def __init__(self, *, metrics: Mapping[str, Metric] | None = None, history: int | None = None) -> None:
        super().__init__(kind="monitor")
        if history is not None and not history >= 1:
            raise ConfigError(f"`history` is a number of steps from 1 up. Got {history!r}.")
        self.hook: Hook
        self.skipped: dict[str, str] = {}
        self._metrics = dict(metrics or {})
        self._history = history
        self._steps: dict[str, deque[tuple[int, _Sums]]] = {}
        self._sums: dict[str, _Sums] = {}
        self._lock = threading.Lock()

    def observe(self, tensor: Tensor, point: Point) -> None:
        name = f"{point.name}[{point.leaf}]" if point.leaf else point.name
        with self._lock:
            sums = self._sums.get(name)
            if sums is None or sums.sums.device != tensor.device:
                fresh = _Sums(tensor.device)
                sums = fresh if sums is None else fresh.merged(sums)
            try:
                sums.add(tensor, self._metrics)
                if self._history is not None:
                    self._of_step(name, point.step, tensor.device).add(tensor, self._metrics)
            except UnreadableError as unreadable:
                self._skip(name, str(unreadable))
            else:
                self._sums[name] = sums

    def _of_step(self, name: str, step: int, device: torch.device) -> _Sums:
        steps = self._steps.setdefault(name, deque(maxlen=self._history))
        if not steps or steps[-1][0] != step or steps[-1][1].sums.device != device:
            steps.append((step, _Sums(device)))
        return steps[-1][1]

    def _skip(self, name: str, reason: str) -> None:
        if name not in self.skipped:
            self.skipped[name] = reason
            if len(self.skipped) == 1:
                warn(f"the monitor leaves out {name!r}: {reason}. `monitor.skipped` names all that it leaves out.")

    def over_time(self, name: str) -> list[tuple[int, Statistics]]:
        """Return (step, statistics of that step) of the last steps, where `history` asks for them."""
        if self._history is None:
            raise ConfigError("the monitor keeps no steps apart: hooks.monitor(..., history=100).")
        if name not in self._steps:
            raise UnknownNameError("monitored point that has fired", name, self._steps)
        return [(step, sums.read()) for step, sums in self._steps[name]]

    def close(self) -> None:
        """Take it off; what was found stays readable."""
        self.hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self) -> None:
        with self._lock:
            self._sums.clear()
            self._steps.clear()
            self.skipped.clear()

    def merge(self, other: Monitor) -> Monitor:
        """Return the statistics of both together, as if one had seen everything: of two runs, or two ranks."""
        both = Monitor(metrics=self._metrics)
        both._sums = dict(self._sums)
        for name, sums in other._sums.items():
            both._sums[name] = both._sums[name].merged(sums) if name in both._sums else sums
        return both

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as plain values, to send to another process."""
        return {
            n: [{k: v.item() for k, v in s.metrics.items()}, s.calls, s.largest.item(), *s.sums.tolist()]
            for n, s in self._sums.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = {}
        for name, (own, calls, largest, *sums) in state.items():
            loaded = self._sums[name] = _Sums(torch.device("cpu"))
            loaded.calls = calls
            loaded.largest = torch.tensor(largest, dtype=torch.float64)
            loaded.sums = torch.tensor(sums, dtype=torch.float64)
            loaded.metrics = {n: torch.tensor(v, dtype=torch.float64) for n, v in own.items()}

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
