"""Which forward pass of the model this is, and which call of a module within it, per thread."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..torchside import graph_task_id, untraced

if TYPE_CHECKING:
    from ._replay import Replay

_CALL = torch.nn.Module._call_impl.__code__

__all__ = ["Run", "Runs", "graph_task_id", "untraced"]


def _calls_itself() -> bool:
    """Return whether the module whose call is about to begin is in a call of its own already, in this thread."""
    calls: list[Any] = []
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _CALL:
            calls.append(frame)
        frame = frame.f_back
    if len(calls) < 2:  # only that call: to look into a frame takes longer than to walk past it
        return False
    module = calls[0].f_locals.get("self")
    return module is not None and any(call.f_locals.get("self") is module for call in calls[1:])


class _Local(threading.local):
    """Calls seen in this thread's present forward pass; those begun and not ended; the repetition it is in."""

    def __init__(self) -> None:
        self.calls: dict[int, int] = {}
        self.recalls: dict[int, int] = {}
        self.begun: dict[int, list[tuple[int, int]]] = {}
        self.step = 0
        self.replay: Replay | None = None


class Run:
    """One forward pass, with gradients on or off. Compared by identity."""

    __slots__ = ("recording", "step")

    def __init__(self, step: int) -> None:
        self.step = step
        self.recording = torch.is_grad_enabled()


class Runs:
    """Counts forward passes of one manager's model.

    Attributes:
        local: this thread's counts.
        run: the present pass, for those who need no thread of their own.
        threaded: more than one thread has run the model; `on_threaded` is called when that is found.
        on_begin: called when a pass begins, while there is need.
        listeners: called with the step when a pass begins.
        last_step: of the pass that began last, in any thread; -1 before the first.
    """

    def __init__(self) -> None:
        self.local = _Local()
        self.listeners: list[Callable[[int], None]] = []
        self.run = Run(0)
        self.threaded = False
        self.on_threaded: Callable[[], None] = lambda: None
        self.on_begin: Callable[[], None] | None = None
        self._owner: int | None = None
        self.last_step = -1
        self.fixed: int | None = None
        self._steps = itertools.count()
        self._keys = itertools.count()

    def new_key(self) -> int:
        return next(self._keys)

    @untraced
    def begin(self, *_: Any) -> None:
        """Begin a forward pass: a forward pre-hook on the root."""
        local = self.local
        if graph_task_id() != -1 or _calls_itself():
            return
        local.calls.clear()
        local.recalls.clear()
        local.begun.clear()
        local.step = self.last_step = next(self._steps) if self.fixed is None else self.fixed
        self.run = Run(local.step)
        if not self.threaded and threading.get_ident() != self._owner:
            self.threaded = self._owner is not None
            self._owner = threading.get_ident()
            if self.threaded:
                self.on_threaded()
        if self.on_begin is not None:
            self.on_begin()
        for listener in tuple(self.listeners):
            listener(local.step)

    def set_step(self, step: int) -> None:
        """From now on the step is what it was last set to; call counts start again."""
        self.fixed = self.last_step = step
        local = self.local
        local.calls.clear()
        local.recalls.clear()
        local.step = step
        self.run = Run(step)

    def count(self, key: int, recompute: bool) -> int:
        """Return the number of this call, and count it."""
        local = self.local
        counts = local.recalls if recompute else local.calls
        call = counts.get(key, 0)
        counts[key] = call + 1
        return call

    def enter(self, key: int, recompute: bool, args: object) -> int:
        """Count a call that begins, to be ended by `leave`; a module that calls itself has several open."""
        call = self.count(key, recompute)
        self.local.begun.setdefault(key, []).append((call, id(args)))
        return call

    def renamed(self, key: int, args: object) -> None:
        """The call that began last goes on with other arguments."""
        begun = self.local.begun.get(key)
        if begun:
            begun[-1] = (begun[-1][0], id(args))

    def leave(self, key: int, recompute: bool, args: object) -> int:
        """Return the number of the call that ends, given the arguments it went on with; calls that raised are passed
        over."""
        begun = self.local.begun.get(key)
        if not begun:
            return self.count(key, recompute)
        place = next((i for i in reversed(range(len(begun))) if begun[i][1] == id(args)), len(begun) - 1)
        call = begun[place][0]
        del begun[place:]
        return call
