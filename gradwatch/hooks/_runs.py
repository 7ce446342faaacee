"""Which forward pass of the model this is, and which call of a module within it, per thread."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

__all__ = ["Inert", "Run", "Runs", "graph_task_id", "untraced"]

# Not -1 while a backward pass runs in this thread: a module that is called then is being recomputed. Private, so
# where it is missing nothing counts as recomputed.
graph_task_id: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)

Function = TypeVar("Function", bound=Callable[..., Any])


def untraced(fn: Function) -> Function:
    """Keep torch.compile from tracing into a function: the graph breaks there, and it runs as it always does.

    `torch.compiler.disable` does the same by a wrapper, which would cost each call as much as a whole hook, and imports
    the compiler. The names are private; where they are missing, torch.compile traces what it can.
    """
    fn._torchdynamo_disable = True  # type: ignore[attr-defined]
    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    with suppress(AttributeError, TypeError):
        strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
        frames.set_code_exec_strategy(fn.__code__, strategy)
    return fn


class _Local(threading.local):
    """Calls seen in this thread's present forward pass."""

    def __init__(self) -> None:
        self.calls: dict[int, int] = {}
        self.recalls: dict[int, int] = {}
        self.step = 0


class Run:
    """One forward pass. Compared by identity."""

    __slots__ = ("step",)

    def __init__(self, step: int) -> None:
        self.step = step


class Runs:
    """Counts forward passes of one manager's model.

    Attributes:
        local: this thread's counts.
        run: the present pass, for those who need no thread of their own.
        threaded: more than one thread has run the model; `on_threaded` is called when that is found.
        listeners: called with the step when a pass begins.
        last_step: of the pass that began last, in any thread; -1 before the first.
    """

    is_copy = False

    def __init__(self) -> None:
        self.local = _Local()
        self.listeners: list[Callable[[int], None]] = []
        self.run = Run(0)
        self.threaded = False
        self.on_threaded: Callable[[], None] = lambda: None
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
        if self.is_copy or graph_task_id() != -1:
            return
        local = self.local
        local.calls.clear()
        local.recalls.clear()
        local.step = self.last_step = next(self._steps) if self.fixed is None else self.fixed
        self.run = Run(local.step)
        if not self.threaded and threading.get_ident() != self._owner:
            self.threaded = self._owner is not None
            self._owner = threading.get_ident()
            if self.threaded:
                self.on_threaded()
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

    def __deepcopy__(self, memo: Any) -> Inert:
        return Inert()

    def __reduce__(self) -> Any:
        return (Inert, ())


class Inert:
    """What takes the place of gradwatch's hooks in a copied or unpickled model: does nothing.

    A deep-copied bound method is the same function bound to the copied object, a pickled one is looked up again by its
    name: so each of our hooks asks `is_copy` first, and its name is found here too.
    """

    is_copy = True
    site: Any = None
    tensor_type = None

    def _nothing(self, *_: Any, **__: Any) -> None:
        return None

    begin = before = after = after_root = full = on_accumulated = on_output = on_output_look = on_placing = _nothing
    __call__ = enter = leave = _nothing


Inert.site = Inert()
