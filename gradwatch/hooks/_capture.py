"""Captures: the last states of some modules, within a bound of number and of bytes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._warn import one_line, warn
from ..errors import ConfigError, UnknownNameError
from ..torchside import give_back_memory, tensors_of
from ._functions import Observer
from ._points import HookPoint, Point
from ._store import ActivationStore

if TYPE_CHECKING:
    from ._hook import Hook
    from ._manager import HookManager

__all__ = ["Capture", "CaptureOptions", "State"]


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """Bounds and form of a capture. See `HookManager.capture`."""

    max_states: int | None = None
    max_states_per_module: int | None = None
    max_age: int | None = None
    memory_limit_mb: float | None = None
    device: Any = None
    dtype: torch.dtype | None = None
    clone: bool = True
    cleanup_interval: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_states", "max_states_per_module", "max_age", "memory_limit_mb", "cleanup_interval"):
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
    """

    id: int
    path: str
    values: Mapping[str, Any]
    call: int
    step: int
    time: float

    @property
    def num_bytes(self) -> int:
        """Memory of its tensors."""
        leaves = [v for value in self.values.values() for v in (value.values() if isinstance(value, dict) else [value])]
        return sum(t.numel() * t.element_size() for t in leaves)

    @property
    def input(self) -> Any:
        return self.values.get("input")

    @property
    def output(self) -> Any:
        return self.values.get("output")

    @property
    def grad_output(self) -> Any:
        """The gradient with respect to the output, once backward has brought it."""
        return self.values.get("grad_output")

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

    def __init__(self, ports: dict[str, set[str]], options: CaptureOptions, store: Any) -> None:
        self.options = options
        self.store = ActivationStore(store) if isinstance(store, (str, Path)) else store
        self.dropped = 0
        self.hook: Hook
        self.hooks: list[Hook] = []
        self.manager: weakref.ref[HookManager] | None = None
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
            values = {p: next(iter(v.values())) if len(v) == 1 else v for p, v in parts.items()}
            if port == "grad_output" and self._join(path, values, call, step):
                return
            self._states.append(State(self._next_id, path, values, call, step, time()))
            self._next_id += 1
            self._bytes += self._states[-1].num_bytes
            self._shrink()
        self._shrink_all()

    def _join(self, path: str, values: dict[str, Any], call: int, step: int) -> bool:
        """Put a gradient into the state of its forward, where that is still held."""
        for state in reversed(self._states):
            if (state.path, state.call, state.step) == (path, call, step) and isinstance(state.values, dict):
                before = state.num_bytes
                held = state.values.get("grad_output")
                new = values["grad_output"]
                both = isinstance(held, dict) and isinstance(new, dict)
                state.values["grad_output"] = {**(held or {}), **new} if both else new
                self._bytes += state.num_bytes - before
                self._shrink()
                return True
        return False

    def _shrink(self) -> None:
        o = self.options
        limit_bytes = float("inf") if o.memory_limit_mb is None else o.memory_limit_mb * 2**20
        most = o.max_states or float("inf")
        while self._states and (len(self._states) > most or self._bytes > limit_bytes):
            self._drop(self._states[0])
        if o.max_age is not None and self._states:
            newest = self._states[-1].step
            for state in [s for s in self._states if s.step < newest - o.max_age]:
                self._drop(state)
        if o.max_states_per_module is not None and self._states:
            own = [s for s in self._states if s.path == self._states[-1].path]
            for state in own[: len(own) - o.max_states_per_module]:
                self._drop(state)

    def _drop(self, state: State) -> None:
        with self._lock:
            if state not in self._states:
                return
            self._states.remove(state)
            self._bytes -= state.num_bytes
            self.dropped += 1
            every = self.options.cleanup_interval
            if every is not None and self.dropped % every == 0:
                _give_back_memory()

    def _shrink_all(self) -> None:
        """Hold all captures of the manager together to its limit: the oldest state of all goes."""
        manager = None if self.manager is None else self.manager()
        if manager is None or manager.capture_limit_mb is None:
            return
        captures = list(manager.captures.values())
        while sum(c.num_bytes for c in captures) > manager.capture_limit_mb * 2**20:
            oldest = [(c._states[0].time, i) for i, c in enumerate(captures) if len(c)]
            if not oldest:
                return
            held = captures[min(oldest)[1]]
            held._drop(held._states[0])

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
        raises = self.hook.options.on_error == "raise"
        for hook in self.hooks:
            hook.remove()
        self._end(raises=raises)

    def _end(self, *, raises: bool = False) -> None:
        try:
            self.flush()
        except Exception as cause:
            if raises:
                raise
            warn(f"a capture's last {len(self._batch)} tensors could not be written: {one_line(cause)}.")
            self._batch = {}

    def save(self, path: str | Path) -> None:
        """Write the states held to one safetensors file, from which `Capture.load` reads each when it is asked for."""
        from ._saved import save_states

        save_states(path, self.states)

    @staticmethod
    def load(path: str | Path) -> Sequence[State]:
        """Return the states of a file that `save` wrote; their tensors are read when they are asked for."""
        from ._saved import SavedStates

        return SavedStates(path)

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
        self._capture = weakref.ref(capture)
        # One that writes to disk goes on: its files can be read without it.
        self._kept = None if capture.store is None else capture

    def observe(self, raw: Any, point: Point) -> None:
        capture = self._capture()
        if capture is None:
            return
        if point.port == "output":
            tree: Any = raw.output
        elif len(raw.args) == 1 and not raw.kwargs:
            tree = raw.args[0]
        else:
            tree = {**{str(i): arg for i, arg in enumerate(raw.args)}, **raw.kwargs}
        for leaf, tensor in tensors_of(tree):
            capture._take(tensor, Point(point.spot, point.hook, point.call, point.step, False, leaf))
        capture._finish(point.path, point.port, point.call, point.step)


class _GradientFeeder(Observer):
    """Shows a capture the gradients of outputs."""

    def __init__(self, capture: Capture) -> None:
        super().__init__(kind="capture")
        self._capture = weakref.ref(capture)
        self._kept = None if capture.store is None else capture

    def observe(self, tensor: Tensor, point: Point) -> None:
        capture = self._capture()
        if capture is not None:
            capture._take(tensor, point)
            capture._finish(point.path, point.port, point.call, point.step)


def capture(
    manager: HookManager, points: Any, *, ports: list[str], options: CaptureOptions, store: Any, hooked: dict[str, Any]
) -> Capture:
    """See `HookManager.capture`."""
    if not ports:
        raise ConfigError("a capture takes inputs, outputs, gradients or several of them.")
    resolver = manager._resolver
    spots: dict[str, HookPoint] = {}
    for found in resolver.resolve(points):
        for port in [found.port] if _names_port(points) and len(ports) == 1 else ports:
            if found.port not in ("input", "output", "grad_output"):
                raise ConfigError(f"a capture takes inputs, outputs and gradients of outputs. Got {found.name!r}.")
            spot = resolver.point(found.path, port)
            spots.setdefault(spot.place, spot)
    wanted: dict[str, set[str]] = {}
    for spot in spots.values():
        wanted.setdefault(spot.path, set()).add(spot.port)
    made = Capture(wanted, options, store)
    made.manager = weakref.ref(manager)
    common = {**{name: value for name, value in hooked.items() if name != "id"}, "priority": -(10**9)}
    forward = [s for s in spots.values() if s.port != "grad_output"]
    backward = [s for s in spots.values() if s.port == "grad_output"]
    name = hooked["id"]
    if forward:
        made.hooks.append(manager.add(forward, _Feeder(made), raw=True, id=name, **common))
        name = None if name is None else f"{name}-gradients"
    if backward:
        made.hooks.append(manager.add(backward, _GradientFeeder(made), id=name, **common))
    made.hook = made.hooks[0]
    manager._captures.add(made)
    manager._at_close(made._end)
    # Of a capture in memory that its user has let go of nothing can be read any more: its tensors and its hook go too.
    for hook in made.hooks if made.store is None else ():
        weakref.finalize(made, hook.remove).atexit = False
    return made


def _names_port(points: Any) -> bool:
    parts = points if isinstance(points, (list, tuple)) else [points]
    return any(isinstance(p, str) and ":" in p and not p.startswith("re:") for p in parts) or isinstance(points, tuple)


def _give_back_memory() -> None:
    """Give freed device memory back to the driver."""
    gc.collect()
    give_back_memory()
