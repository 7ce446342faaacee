"""One hook: a function at one or many points, with its life cycle and its conditions."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from sys import getrefcount
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._warn import one_line, warn
from ..errors import ConfigError, HookBreak, HookError
from ._functions import HookFunction, Intervention, Observer, _Function
from ._options import HookOptions
from ._points import HookPoint, Point, check_replacement

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self

    from ._manager import HookManager
    from ._registry import Registry

__all__ = ["Entry", "Hook", "HookContext", "HookOptions"]

# `torch.no_grad()` does the same and costs as much as a whole hook.
set_grad_enabled: Callable[[bool], Any] = getattr(torch._C, "_set_grad_enabled", torch.set_grad_enabled)


class HookContext:
    """What belongs to a hook's surroundings.

    Attributes:
        store: a dict that all hooks of the manager share.
    """

    __slots__ = ("_manager", "_model", "store")

    def __init__(self, manager: HookManager, model: nn.Module, store: dict[str, Any]) -> None:
        # A hook that is off must not keep its manager or model, nor manager and hook each other.
        self._manager = weakref.ref(manager)
        self._model = weakref.ref(model)
        self.store = store

    @property
    def model(self) -> nn.Module:
        """The manager's model.

        Raises:
            ReferenceError: it is gone.
        """
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this hook is gone")
        return model

    @property
    def manager(self) -> HookManager:
        """The manager that the hook was added to.

        Raises:
            ReferenceError: it is gone.
        """
        manager = self._manager()
        if manager is None:
            raise ReferenceError("the HookManager of this hook is gone")
        return manager

    @property
    def hooks(self) -> tuple[Hook, ...]:
        """All hooks of the manager at present."""
        return tuple(self.manager.hooks)


def _bare_references() -> int:
    """Return how many references an object has that only a local name holds: a matter of the Python version."""
    fresh = object()
    return getrefcount(fresh)


_BARE = _bare_references()
_LOST = (
    "the output is a view that was changed in place after its module returned it: torch drops the hook on its "
    "gradient. Hook another point, or a module that returns a copy"
)


def _leaf_of(leaf: str, spot: HookPoint) -> str:
    """Return a leaf as it is counted: an argument that goes by position may be named as the module's forward does."""
    first, dot, rest = leaf.partition(".")
    if spot.port not in ("input", "grad_at_input") or spot.module is None or first.isdigit():
        return leaf
    try:
        names = list(inspect.signature(spot.module.forward).parameters)
    except (TypeError, ValueError):
        return leaf
    return leaf if first not in names else f"{names.index(first)}{dot}{rest}|{leaf}"


class Entry:
    """One hook at one point; counts what happens there.

    Attributes:
        fired: calls in which the function ran, recomputed ones not counted.
        placed: gradients that were asked for (a backward port whose forward was seen).
        seen: calls of the module while the hook was on.
        site: what tells the site that it belongs to.
        shaded: calls with gradients off inside a run with gradients on: in reentrant checkpointing the repetition will
            place what could not be placed there.
        note: why it may not have fired.
    """

    __slots__ = (
        "__weakref__",
        "_fired",
        "_quick",
        "done",
        "hook",
        "leaf",
        "note",
        "placed",
        "seen",
        "shaded",
        "site",
        "spot",
    )

    def __init__(self, hook: Hook, spot: HookPoint) -> None:
        self.hook = hook
        self.spot = spot
        self.site = spot.site
        self.leaf = spot.leaf if hook.options.leaf is None else _leaf_of(hook.options.leaf, spot)
        self._fired = self.placed = self.seen = self.shaded = 0
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
        self.hook.count_late()

    def reset(self) -> None:
        self._fired = self.placed = self.seen = self.shaded = 0
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
        self._registry: Registry | None = manager._registry
        self._registry_ref = weakref.ref(manager._registry)
        self.error: HookError | None = None
        self._held = tuple(Entry(self, point) for point in self.points)
        self._entries = tuple(map(weakref.ref, self._held))
        self._settled = 0
        self.order = 0
        self.thread: int | None = None
        self.observes = isinstance(fn, Observer)
        self.function = _innermost(fn)
        self.pure = getattr(fn, "is_pure", False)
        self.keeps = False
        self._enabled = True
        self.alive = True
        self.attached = False
        self._set_plain()

    def _set_plain(self) -> None:
        o = self.options
        self.skips_recompute = self.observes if o.recompute is None else not o.recompute
        self.unconditional = not (o.every > 1 or o.when or o.once or o.raw)
        self.plain = self.unconditional and self.thread is None

    def bind_to_thread(self) -> None:
        """Fire in the calling thread only."""
        self.thread = get_ident()
        self._set_plain()

    @property
    def manager(self) -> HookManager:
        return self.context.manager

    @property
    def registry(self) -> Registry | None:
        """What hangs it on the model; None when it is off and its manager gone."""
        return self._registry if self._registry is not None else self._registry_ref()

    def _refit(self) -> None:
        registry = self.registry
        if registry is not None:
            registry.refresh(self)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Its points with their counts; of a hook that has been taken off, those that a graph still holds."""
        return self._held or tuple(entry for ref in self._entries if (entry := ref()) is not None)

    @property
    def is_enabled(self) -> bool:
        return self._enabled and self.alive and self.attached

    @property
    def is_removed(self) -> bool:
        """Whether it is off the model; in graphs of a run that is over it may act still."""
        return not (self.alive and self.attached)

    @property
    def calls(self) -> int:
        """How often the function ran, recomputed forward passes not counted."""
        return sum(entry.fired for entry in self._held) + self._settled

    def count_late(self) -> None:
        if not self._held:
            self._settled += 1

    def settle(self) -> None:
        """Let go of the points, which hold the hook: it is off the model, and to be freed with its last graph."""
        if self._held:
            for entry in self._held:
                entry.counted_by(None)
            self._settled = self.calls
            self._held = ()
            if self.observes:  # one that gathers (a monitor) and its hook hold each other: not the model too
                self.points = tuple(point.unbound() for point in self.points)
        self._registry = None
        self.attached = False

    def set_options(self, **options: Any) -> Hook:
        """Change options of a hook that is in place: `hook.set_options(every=10, priority=2)`.

        Raises:
            ConfigError: an option that can't be, or can't be changed (`raw`, `leaf`).
            UnknownNameError: an option that a hook does not have.
        """
        HookOptions.refuse_unknown(options)
        fixed = sorted({"raw", "leaf"} & set(options))
        if fixed:
            raise ConfigError(f"`{fixed[0]}` can't be changed on a hook that is in place: add another.")
        self.options = replace(self.options, **options)
        self._set_plain()
        self._refit()
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

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
            self._refit()
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
        """Take the hook off for good; it does not fire in graphs that already exist either. Twice is harmless.

        Only where activation checkpointing repeats a forward in which it acted it acts once more: the repetition must
        give what the forward gave.
        """
        registry = self.registry
        if registry is not None:
            registry.detach([self])
        self.alive = False

    def reset(self) -> None:
        """Zero the counts, and let the function forget what it gathered."""
        self._settled = 0
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
        # Not the one that is raised: the frames in its traceback hold the user's tensors.
        error = self.error = point.error(cause)
        if self.options.on_error == "raise":
            raise point.error(cause) from cause
        error.__cause__ = cause.with_traceback(None)
        done = "the hook goes on"
        if self.options.on_error == "disable":
            self.disable()
            done = "the hook was disabled"
        elif self.options.on_error == "close":
            manager = self.context._manager()
            registry = self.registry
            if manager is not None:
                manager.close()
            elif registry is not None:
                registry.close()
            done = "all hooks of its manager were taken off"
        warn(f"{one_line(str(error), 400)}; {done}, and the run goes on with the tensor untouched.", stacklevel=2)

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
                look(self.function, tensor, point)
                return None
            return self._intervene(tensor, point, guarded)
        except HookBreak:
            raise
        except Exception as cause:
            self.fail(cause, point)
            return None

    def miss(self, entry: Entry, point: Point) -> None:
        """Backward went past a point: what one that only looks has missed is said, what another has not done raises."""
        if not (self.alive and self._enabled) or entry.done:
            return
        entry.note = _LOST
        if self.observes:
            warn(f"hook {self.id!r} at {point.name!r} missed a gradient: {_LOST}.")
        else:
            self.fail(RuntimeError(_LOST), point)

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
        # What is shown is the tensor itself, where a change in place acts by itself; else a copy, to be written back.
        apart = not guarded and (spot.view is not None or spot.writing != "replace")
        seen = tensor if spot.view is None else spot.view.read(tensor)
        shown = seen.clone() if apart and not self.pure else seen
        version = _version(shown) if guarded or apart else None
        references = getrefcount(shown)
        result = self.function(shown, point)
        held = result is not None and result is not shown and getrefcount(result) > _BARE
        kept = held or getrefcount(shown) > references
        if kept and (shown.requires_grad or getattr(result, "requires_grad", False)):
            self.keeps = True
        changed = apart and not torch.equal(shown, seen) if version is None else _version(shown) != version
        if changed and guarded:
            raise RuntimeError("it changed the gradient in place, which other branches may share: return a new tensor")
        if result is None and changed and apart:
            result = shown
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
        state = "removed" if self.is_removed else "enabled" if self._enabled else "disabled"
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
        view = point.spot.view
        fn(tensor if view is None else view.read(tensor), point)
    finally:
        set_grad_enabled(recording)
    if _version(tensor) != version:
        raise RuntimeError("an observer changed the tensor in place: use an Intervention, or work on a copy")
