"""One hook: a function at one or many points, with its life cycle and its conditions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import GradwatchWarning, HookBreak, HookError
from ._functions import HookFunction, Intervention, Observer, _Function
from ._options import HookOptions
from ._points import HookPoint, Point, check_replacement

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._manager import HookManager

__all__ = ["Entry", "Hook", "HookContext", "HookOptions"]

# `torch.no_grad()` does the same and costs as much as a whole hook.
set_grad_enabled: Callable[[bool], Any] = getattr(torch._C, "_set_grad_enabled", torch.set_grad_enabled)


@dataclass(frozen=True)
class HookContext:
    """What belongs to a hook's surroundings.

    Attributes:
        manager: that the hook was added to.
        model: the manager's model.
        store: a dict that all hooks of the manager share.
    """

    manager: HookManager
    model: nn.Module
    store: dict[str, Any]

    @property
    def hooks(self) -> tuple[Hook, ...]:
        """All hooks of the manager at present."""
        return tuple(self.manager.hooks)


class Entry:
    """One hook at one point; counts what happens there.

    Attributes:
        fired: calls in which the function ran, recomputed ones not counted.
        placed: gradients that were asked for (a backward port whose forward was seen).
        seen: calls of the module while the hook was on.
        note: why it may not have fired.
    """

    __slots__ = ("_fired", "_quick", "done", "hook", "leaf", "note", "placed", "seen", "spot")

    def __init__(self, hook: Hook, spot: HookPoint) -> None:
        self.hook = hook
        self.spot = spot
        self.leaf = hook.options.leaf if hook.options.leaf is not None else spot.leaf
        self._fired = self.placed = self.seen = 0
        self._quick: Any = None
        self.note = ""
        self.done = False

    def counted_by(self, quick: Any) -> None:
        """From now on a quick dispatcher counts too, in its own `fired`."""
        if self._quick is not None:
            self._fired += self._quick.fired
        self._quick = quick

    @property
    def fired(self) -> int:
        return self._fired if self._quick is None else self._fired + self._quick.fired

    def count(self) -> None:
        self._fired += 1

    def reset(self) -> None:
        self._fired = self.placed = self.seen = 0
        self.done = False
        if self._quick is not None:
            self._quick.fired = 0


class Hook:
    """A function at one or many hook points, from `HookManager.add` until `remove`.

    Attributes:
        id: unique in its manager.
        fn: the function.
        points: where it sits.
        context: manager, model, store, other hooks.
        error: the last `HookError`, where `on_error` let the run go on.
    """

    def __init__(
        self, manager: HookManager, hook_id: str, fn: HookFunction, points: Sequence[HookPoint], options: HookOptions
    ) -> None:
        self.id = hook_id
        self.fn = fn
        self.points = tuple(points)
        self.options = options
        self.context = HookContext(manager, manager.model, manager.store)
        self.error: HookError | None = None
        self.entries = tuple(Entry(self, point) for point in self.points)
        self.order = 0
        self.thread: int | None = None
        self.observes = isinstance(fn, Observer)
        self.function = _innermost(fn)
        self.skips_recompute = self.observes if options.recompute is None else not options.recompute
        self._enabled = True
        self.alive = True
        self._set_plain()

    def _set_plain(self) -> None:
        o = self.options
        self.plain = not (o.every > 1 or o.when or o.once or o.raw or self.thread is not None)

    def bind_to_thread(self) -> None:
        """Fire in the calling thread only."""
        self.thread = get_ident()
        self._set_plain()

    @property
    def manager(self) -> HookManager:
        return self.context.manager

    @property
    def is_enabled(self) -> bool:
        return self._enabled and self.alive

    @property
    def is_removed(self) -> bool:
        return not self.alive

    @property
    def calls(self) -> int:
        """How often the function ran, recomputed forward passes not counted."""
        return sum(entry.fired for entry in self.entries)

    @property
    def metadata(self) -> dict[str, Any]:
        """The function's, where it has any."""
        found = getattr(self.fn, "metadata", None)
        return found if isinstance(found, dict) else {}

    def enable(self) -> Hook:
        return self._switch(True)

    def disable(self) -> Hook:
        """Stop firing, at once, in backward too. Costs nothing while disabled: torch holds no hook then."""
        return self._switch(False)

    def _switch(self, on: bool) -> Hook:
        if self.alive and self._enabled != on:
            self._enabled = on
            self.manager._refresh(self)
        return self

    @contextmanager
    def disabled(self) -> Iterator[Hook]:
        """Off within the context; afterwards as it was."""
        was = self._enabled
        self.disable()
        try:
            yield self
        finally:
            self._switch(was)

    def remove(self) -> None:
        """Take the hook off for good; it does not fire in graphs that already exist either. Twice is harmless."""
        self.manager._remove([self])

    def reset(self) -> None:
        """Zero the counts, and let the function forget what it gathered."""
        for entry in self.entries:
            entry.reset()
        if isinstance(self.fn, _Function) or hasattr(self.fn, "reset"):
            self.fn.reset()

    def wants(self, step: int, recompute: bool, backward: bool = False) -> bool:
        """Return whether the hook fires at this step, in this thread."""
        if self.plain:
            return not (recompute and self.skips_recompute)
        if self.thread is not None and not backward and get_ident() != self.thread:
            return False
        if recompute and self.skips_recompute:
            return False
        return step % self.options.every == 0

    def fail(self, cause: Exception, point: Point) -> None:
        """Act by the hook's policy on an exception of its function."""
        error = point.error(cause)
        self.error = error
        if self.options.on_error == "raise":
            raise error from cause
        error.__cause__ = cause
        if self.options.on_error == "disable":
            self.disable()
            done = "the hook was disabled"
        else:
            self.manager.close()
            done = "all hooks of its manager were taken off"
        warnings.warn(
            f"{error}; {done}, and the run goes on with the tensor untouched.", GradwatchWarning, stacklevel=2
        )

    def holds(self, point: Point) -> bool:
        """Return whether the hook's own condition holds."""
        if self.options.when is None:
            return True
        try:
            return bool(self.options.when(point))
        except Exception as cause:
            self.fail_or_break(cause, point)
            return False

    def fire(self, tensor: Tensor, point: Point, guarded: bool) -> Tensor | None:
        """Run the function on one tensor; return what takes its place, or None.

        Args:
            tensor: what is at the point.
            point: told to the function.
            guarded: a change in place is an error (gradients: autograd may share them with other branches).
        """
        try:
            if self.observes:
                look(self.function, tensor if point.spot.view is None else point.spot.view.read(tensor), point)
                return None
            return self._intervene(tensor, point, guarded)
        except HookBreak:
            raise
        except Exception as cause:
            self.fail(cause, point)
            return None

    def fail_or_break(self, cause: Exception, point: Point) -> None:
        """Let a break through, and act by the policy on anything else."""
        if isinstance(cause, HookBreak):
            raise cause
        self.fail(cause, point)

    def checked(self, new: Any, old: Tensor, point: Point) -> Tensor | None:
        """Return what a function gave, if it can take the tensor's place."""
        try:
            return check_replacement(new, old)
        except (TypeError, ValueError) as cause:
            self.fail(cause, point)
            return None

    def _intervene(self, tensor: Tensor, point: Point, guarded: bool) -> Tensor | None:
        spot = point.spot
        shown = tensor.clone() if spot.writing == "in_place" else tensor
        shown = shown if spot.view is None else spot.view.read(shown)
        version = _version(shown) if guarded else None
        result = self.function(shown, point)
        if version is not None and _version(shown) != version:
            raise RuntimeError("it changed the gradient in place, which other branches may share: return a new tensor")
        if result is None:
            return None
        new = check_replacement(result, shown)
        if spot.writing == "refuse":
            raise RuntimeError(f"{spot.name!r} can be read only: the model does not use this tensor any more")
        new = new if spot.view is None else spot.view.write(tensor, new)
        if spot.writing == "in_place":
            tensor.copy_(new)
            return None
        return new

    def __repr__(self) -> str:
        state = "removed" if not self.alive else "enabled" if self._enabled else "disabled"
        at = self.points[0] if len(self.points) == 1 else f"{len(self.points)} points"
        return f"Hook({self.id!r}, at {at}, {state}, fired {self.calls} times)"


def _innermost(fn: HookFunction) -> HookFunction:
    """Return what an observer or intervention would end up calling, where its class adds nothing of its own."""
    for kind, name in ((Observer, "observe"), (Intervention, "intervene")):
        if isinstance(fn, kind) and type(fn).__call__ is kind.__call__:
            if getattr(type(fn), name) is not getattr(kind, name):
                return getattr(fn, name)
            if fn.fn is not None and type(fn)._apply is _Function._apply:
                return fn.fn
    return fn


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def look(fn: HookFunction, tensor: Tensor, point: Point) -> None:
    """Run an observer: without recording a graph, and with an error where it changes the tensor in place."""
    version = _version(tensor)
    recording = torch.is_grad_enabled()
    set_grad_enabled(False)
    try:
        fn(tensor, point)
    finally:
        set_grad_enabled(recording)
    if _version(tensor) != version:
        raise RuntimeError("an observer changed the tensor in place: use an Intervention, or work on a copy")
