"""Captures: the last states of some modules, within a bound of number and of bytes."""

from __future__ import annotations

import gc
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError, UnknownNameError
from ._functions import Observer
from ._points import HookPoint, Point
from ._pytree import tensors_of
from ._store import ActivationStore

if TYPE_CHECKING:
    from ._hook import Hook
    from ._manager import HookManager

__all__ = ["Capture", "CaptureOptions", "State"]


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """Bounds and form of a capture. See `HookManager.capture`."""

    max_states: int | None = None
    memory_limit_mb: float | None = None
    device: Any = None
    dtype: torch.dtype | None = None
    clone: bool = True
    cleanup_interval: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_states", "memory_limit_mb", "cleanup_interval"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"`{name}` is above 0, or None for no limit. Got {value!r}.")


@dataclass(frozen=True, eq=False)
class State:
    """What one call of one module took and gave.

    Attributes:
        id: counts up from 0 within the capture; it names the state in `clear`.
        path: of the module (parameter).
        values: by port: a tensor, or a dict from leaf to tensor.
        call: 0, 1, ... within one forward pass.
        step: of the forward pass.
        time: seconds since the epoch.
        num_bytes: of the tensors.
    """

    id: int
    path: str
    values: Mapping[str, Any]
    call: int
    step: int
    time: float
    num_bytes: int

    @property
    def input(self) -> Any:
        return self.values.get("input")

    @property
    def output(self) -> Any:
        return self.values.get("output")

    def __getitem__(self, port: str) -> Any:
        if port not in self.values:
            raise UnknownNameError("port", port, self.values, where=f"state {self.id} of {self.path!r}")
        return self.values[port]


class Capture:
    """A ring of states: the newest are kept, the oldest dropped and counted. Safe to read from other threads.

    With a store, states are written to disk, one file for each forward pass, and not kept in memory.

    Attributes:
        hook: that feeds it; `capture.hook.disable()` pauses.
        dropped: states that had to go.
        store: on disk, or None.
    """

    def __init__(self, manager: HookManager, ports: dict[str, set[str]], options: CaptureOptions, store: Any) -> None:
        self.options = options
        self.store = ActivationStore(store) if isinstance(store, (str, Path)) else store
        self.dropped = 0
        self.hook: Hook
        self._manager = manager
        self._wanted = ports
        self._states: deque[State] = deque()
        self._pending: dict[tuple[int, str, int], dict[str, dict[str, Tensor]]] = {}
        self._batch: dict[str, Tensor] = {}
        self._batch_step = -1
        self._bytes = 0
        self._next_id = 0
        self._lock = threading.RLock()

    def _take(self, tensor: Tensor, point: Point) -> None:
        """Keep one tensor: a state is whole when the last wanted port of its call has been seen."""
        o = self.options
        dtype = o.dtype if tensor.is_floating_point() else None
        kept = tensor.detach()
        kept = kept.to(device=o.device, dtype=dtype, copy=o.clone) if o.device or dtype or o.clone else kept
        with self._lock:
            key = (threading.get_ident(), point.path, point.call)
            parts = self._pending.setdefault(key, {})
            parts.setdefault(point.port, {})[point.leaf] = kept

    def _finish(self, path: str, port: str, call: int, step: int) -> None:
        """A module's call is over as far as this port goes."""
        if port == "input" and "output" in self._wanted[path]:
            return
        with self._lock:
            parts = self._pending.pop((threading.get_ident(), path, call), None)
            if not parts:
                return
            if self.store is not None:
                self._to_disk(path, parts, call, step)
                return
            size = sum(t.numel() * t.element_size() for leaves in parts.values() for t in leaves.values())
            values = {p: next(iter(v.values())) if len(v) == 1 else v for p, v in parts.items()}
            self._states.append(State(self._next_id, path, values, call, step, time.time(), size))
            self._next_id += 1
            self._bytes += size
            self._shrink()

    def _shrink(self) -> None:
        limit = self.options.memory_limit_mb
        limit_bytes = float("inf") if limit is None else limit * 2**20
        most = self.options.max_states or float("inf")
        while self._states and (len(self._states) > most or self._bytes > limit_bytes):
            self._bytes -= self._states.popleft().num_bytes
            self.dropped += 1
            every = self.options.cleanup_interval
            if every is not None and self.dropped % every == 0:
                _give_back_memory()

    def _to_disk(self, path: str, parts: dict[str, dict[str, Tensor]], call: int, step: int) -> None:
        if step != self._batch_step:
            self.flush()
            self._batch_step = step
        for port, leaves in parts.items():
            for leaf, tensor in leaves.items():
                name = f"{path}:{port}" + (f"#{call}" if call else "") + (f"[{leaf}]" if leaf else "")
                if name in self._batch:  # the same forward pass in another thread
                    self.flush()
                self._batch[name] = tensor

    def flush(self) -> None:
        """Write what is not on disk yet, where there is a store."""
        with self._lock:
            if self.store is not None and self._batch:
                self.store.append(self._batch, step=self._batch_step)
                self._batch = {}

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[State]:
        with self._lock:
            return iter(tuple(self._states))

    def __getitem__(self, index: int) -> State:
        with self._lock:
            return self._states[index]

    @property
    def states(self) -> list[State]:
        """All states held, oldest first."""
        return list(self)

    def of(self, path: str) -> list[State]:
        """Return the states of one module, oldest first."""
        if path not in self._wanted:
            raise UnknownNameError("captured module", path, self._wanted)
        return [state for state in self if state.path == path]

    @property
    def num_bytes(self) -> int:
        return self._bytes

    def clear(self, *ids: int) -> int:
        """Forget the states with these ids, or all; return how many went. They do not count as dropped."""
        with self._lock:
            before = len(self._states)
            self._states = deque(s for s in self._states if ids and s.id not in ids)
            self._bytes = sum(s.num_bytes for s in self._states)
            return before - len(self._states)

    def close(self) -> None:
        """Stop capturing; what was captured stays readable, and a store is written to the end."""
        self.hook.remove()
        self.flush()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Capture({len(self)} states, {self._bytes / 2**20:.1f} MiB, {self.dropped} dropped)"


class _Feeder(Observer):
    """Shows a capture whole calls: all tensors of a port, then its end."""

    def __init__(self, capture: Capture) -> None:
        super().__init__(kind="capture")
        self.capture = capture

    def observe(self, raw: Any, point: Point) -> None:
        if point.port == "output":
            tree: Any = raw.output
        elif len(raw.args) == 1 and not raw.kwargs:
            tree = raw.args[0]
        else:
            tree = {**{str(i): arg for i, arg in enumerate(raw.args)}, **raw.kwargs}
        for leaf, tensor in tensors_of(tree):
            self.capture._take(tensor, Point(point.spot, point.hook, point.call, point.step, False, leaf))
        self.capture._finish(point.path, point.port, point.call, point.step)


def capture(
    manager: HookManager, points: Any, *, inputs: bool, outputs: bool, options: CaptureOptions, store: Any, hook_id: Any
) -> Capture:
    """See `HookManager.capture`."""
    if not (inputs or outputs):
        raise ConfigError("a capture takes inputs, outputs or both.")
    resolver = manager._resolver
    spots: dict[str, HookPoint] = {}
    for found in resolver.resolve(points):
        ports = [port for port, wanted in (("input", inputs), ("output", outputs)) if wanted]
        if _names_port(points) and not (inputs and outputs):
            ports = [found.port]
        for port in ports:
            if found.port not in ("input", "output"):
                raise ConfigError(f"a capture takes inputs and outputs. Got {found.name!r}; gradients: run_with_cache.")
            spot = resolver.point(found.path, port)
            spots.setdefault(spot.place, spot)
    wanted: dict[str, set[str]] = {}
    for spot in spots.values():
        wanted.setdefault(spot.path, set()).add(spot.port)
    made = Capture(manager, wanted, options, store)
    made.hook = manager.add(list(spots.values()), _Feeder(made), raw=True, id=hook_id, priority=-(10**9))
    manager._on_close.append(made.flush)
    return made


def _names_port(points: Any) -> bool:
    parts = points if isinstance(points, (list, tuple)) else [points]
    return any(isinstance(p, str) and ":" in p and not p.startswith("re:") for p in parts) or isinstance(points, tuple)


def _give_back_memory() -> None:
    """Give freed device memory back to the driver."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
