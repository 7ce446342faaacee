"""Forward and backward time, calls and activation memory of every module."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..torchside import WeakHook, storage_identity, tensors_of, untraced
from ._gradients import hook_gradient
from ._profile_records import Clock, Record
from ._profile_report import ModuleProfile, chrome_trace, summarise, table
from ._runs import graph_task_id

if TYPE_CHECKING:
    from ._manager import HookManager

__all__ = ["Profile"]


class Profile(Sequence[ModuleProfile]):
    """A profile being taken, and what it found. Ends with the `with` block, or with `stop()`.

    Forward time is from the module's call to its return. Backward time is from the arrival of the gradient of its
    output to that of its input (or, where no input requires a gradient, of its last parameter); a residual branch
    around a module that is still at work then counts in. On CUDA, times come from events on the stream: nothing waits
    until the numbers are read.

    Example:
        >>> with hooks.profile() as profile:
        ...     model(x).sum().backward()
        >>> print(profile.table())
        >>> profile.save_chrome_trace("trace.json")
    """

    def __init__(self, manager: HookManager, points: Any = "*") -> None:
        model = manager.model
        found = manager._resolver.resolve(points)
        modules = {p.path: p.target for p in found if not p.is_parameter}
        if not modules:
            raise ConfigError(f"a profile is of modules. {points!r} names none.")
        self._clock = Clock(model)
        self._types = {path: type(module).__name__ for path, module in modules.items()}
        self._records: list[Record] = []
        self._parameter_times: list[tuple[str, Any, int]] = []
        self._local = threading.local()
        self._handles: list[Any] = []
        self._leaf_handles: dict[tuple[str, str, int], Any] = {}
        self._order: dict[str, int] = {path: i for i, path in enumerate(modules)}
        self._summary: list[ModuleProfile] | None = None
        self.is_running = True
        try:
            self._attach(model, modules)
        except BaseException:
            self.stop()
            raise
        manager._at_close(self.stop)

    def _attach(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        for path, module in modules.items():
            enter, leave = WeakHook(self, Profile._on_enter, path), WeakHook(self, Profile._on_leave, path)
            self._handles.append(enter.hang(module.register_forward_pre_hook, prepend=True, with_kwargs=True))
            self._handles.append(leave.hang(module.register_forward_hook, with_kwargs=True, always_call=True))
        for path, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(WeakHook(self, Profile._on_parameter, path).hang(parameter.register_hook))

    def _stack(self) -> list[Record]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        stack: list[Record] = self._local.stack
        return stack

    def _on_enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._enter(path, (args, kwargs))

    def _on_leave(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._leave(path, (args, kwargs), output)

    def _on_parameter(self, path: str, grad: Tensor | None) -> None:
        """Note when a parameter's gradient has been computed."""
        if self.is_running:
            self._parameter_times.append((path, self._clock.now(), graph_task_id()))

    def _enter(self, path: str, inputs: Any) -> None:
        stack = self._stack()
        record = Record(path, len(stack), graph_task_id() != -1, threading.get_ident(), stack[-1] if stack else None)
        for _, tensor in tensors_of(inputs):
            record.input_storages.add(storage_identity(tensor)[0])
            if tensor.requires_grad and torch.is_grad_enabled():
                self._keep_if_leaf(record, tensor, tensor.register_hook(_Mark(self, record, "backward_end")))
        stack.append(record)
        self._records.append(record)
        record.memory_before = self._clock.memory()
        record.forward_start = self._clock.now()

    def _leave(self, path: str, inputs: Any, output: Any) -> None:
        stack = self._stack()
        while stack and stack[-1].path != path:  # an exception went past modules that are not hooked any more
            stack.pop()
        if not stack:
            return
        record = stack.pop()
        record.forward_end = self._clock.now()
        record.memory_after = self._clock.memory()
        seen = set(record.input_storages)
        for _, tensor in tensors_of(output):
            pointer, size = storage_identity(tensor)
            if pointer not in seen:
                seen.add(pointer)
                record.activation_bytes += size
            if tensor.requires_grad and torch.is_grad_enabled():
                mark = _Mark(self, record, "backward_start")
                handle = hook_gradient(tensor, mark, inputs[0]) if tensor is output else tensor.register_hook(mark)
                self._keep_if_leaf(record, tensor, handle)

    def _keep_if_leaf(self, record: Record, tensor: Tensor, handle: Any) -> None:
        """A hook on a leaf outlives the graph: at most one a module and leaf stays, that of the last call."""
        if not tensor.is_leaf:
            return
        key = (record.path, "start" if record.forward_end is not None else "end", id(tensor))
        previous = self._leaf_handles.pop(key, None)
        if previous is not None:
            previous.remove()
        self._leaf_handles[key] = handle

    def stop(self) -> Profile:
        """Take all hooks off; what was found stays. Twice is harmless."""
        self.is_running = False
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()
        for key, handle in list(self._leaf_handles.items()):
            handle.remove()
            self._leaf_handles.pop(key, None)
        return self

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def modules(self) -> list[ModuleProfile]:
        """What was found so far, one entry a module that ran, parents before children. Waits for the device."""
        if self._summary is None or self.is_running:
            self._clock.wait()
            self._summary = summarise(self._records, self._parameter_times, self._types, self._order, self._clock)
        return self._summary

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, str):
            return next(m for m in self.modules if m.path == which)
        return self.modules[which]

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[ModuleProfile]:
        return iter(self.modules)

    def table(self, *, sort: str | None = None, top: int | None = None) -> str:
        """Return the profile as text: in model order, or by a column (`"forward_ms"`, `"backward_ms"`, ...)."""
        return table(self.modules, sort=sort, top=top)

    def chrome_trace(self) -> dict[str, Any]:
        """Return the events in Chrome's trace format, for chrome://tracing and Perfetto."""
        self._clock.wait()
        return chrome_trace(self._records, self._parameter_times, self._types, self._clock)

    def save_chrome_trace(self, path: str | Path) -> None:
        """Write `chrome_trace()` as JSON."""
        import json

        Path(path).write_text(json.dumps(self.chrome_trace()))

    def __repr__(self) -> str:
        return f"Profile({len(self._records)} calls, {'running' if self.is_running else 'stopped'})"


class _Mark:
    """Notes when a gradient passes. Holds the record, never the tensor."""

    __slots__ = ("profile", "record", "what")
    __torch_unserializable__ = True

    def __init__(self, profile: Profile, record: Record, what: str) -> None:
        self.profile, self.record, self.what = profile, record, what

    @untraced
    def __call__(self, grad: Tensor | None) -> None:
        if not self.profile.is_running:
            return
        record, task = self.record, graph_task_id()
        if self.what == "backward_start":
            if record.backward_start is not None:
                return  # of several outputs the first, and of several backwards
            record.backward_task = task
        elif record.backward_start is not None and record.backward_task != task:
            return  # a leaf that many passes share: this is another one's backward
        setattr(record, self.what, self.profile._clock.now())
