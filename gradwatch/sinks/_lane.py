"""A sink's calls, in order, in a thread of its own: a sink that blocks never holds the training."""

from __future__ import annotations

import contextvars
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["PATIENCE", "Lane"]

PATIENCE = 0.25
"""A call is waited for so long, so that a quick sink is done when the step is, and errors come where they belong."""
MAX_WAITING = 4096
"""Records, and calls, that may wait for a sink that blocks."""


class _Call:
    __slots__ = ("context", "done", "error", "job", "weight", "what")

    def __init__(self, what: Any, job: Callable[[], object], weight: int) -> None:
        self.what, self.job, self.weight = what, job, weight
        self.error: BaseException | None = None
        # What a logger keeps by context (MLflow its active run) is what it is for the training.
        self.context = contextvars.copy_context()
        self.done = threading.Lock()
        self.done.acquire()


class Lane:
    """Makes calls one after the other, in a thread that begins with the first one.

    Attributes:
        dropped: records that were let go, since so many waited already.
        errors: what calls raised that nobody waited for, each with what was called.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self.errors: deque[tuple[Any, BaseException]] = deque()
        self._calls: deque[_Call] = deque()
        self._weight = 0
        self._wake = threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._is_behind = False

    def __reduce__(self) -> Any:
        return Lane, ()

    def __del__(self) -> None:
        self.stop()

    @property
    def is_behind(self) -> bool:
        """Whether calls wait for one that takes its time."""
        return self._is_behind and bool(self._calls)

    @property
    def num_waiting(self) -> int:
        """Calls that are not over."""
        return len(self._calls)

    def call(
        self,
        what: Any,
        job: Callable[[], object],
        *,
        weight: int = 0,
        room: int = MAX_WAITING,
        patience: float = PATIENCE,
    ) -> bool:
        """Make a call; return whether it is over.

        Args:
            what: is called; kept with the error where nobody waits for it.
            job: what to do.
            weight: records that it hands over; such a call is let go where too many wait.
            room: how many may.
            patience: how long to wait for it. Not at all while an earlier one is still waited for.

        Raises:
            Exception: what the call raised, if it ended meanwhile.
        """
        if self._pid != os.getpid() or threading.current_thread() is self._thread or not self._starts():
            job()
            return True
        is_behind = self.is_behind
        if weight and is_behind and self._weight + weight > room:
            self.dropped += weight
            return False
        call = _Call(what, job, weight)
        self._weight += weight
        self._calls.append(call)
        self._wake.release()
        if is_behind and patience <= PATIENCE:
            return False
        if not call.done.acquire(timeout=patience):
            self._is_behind = True
            return False
        self._is_behind = False
        if call.error is not None:
            self._forget(call)
            raise call.error
        return True

    def stop(self) -> None:
        """Let the thread end when what waits is done."""
        if self._thread is not None and self._pid == os.getpid():
            self._calls.append(_Call("", lambda: None, -1))
            self._wake.release()
            self._thread = None

    def _forget(self, call: _Call) -> None:
        for entry in list(self.errors):
            if entry[1] is call.error:
                self.errors.remove(entry)

    def _starts(self) -> bool:
        if self._thread is not None:
            return True
        thread = threading.Thread(
            target=_work, args=(weakref.ref(self), self._wake), name="gradwatch-sink", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # the interpreter is ending
            return False
        self._thread = thread
        return True

    def turn(self) -> bool:
        """Make the next call; return whether there may be another."""
        call = self._calls[0]
        if call.weight < 0:
            self._calls.popleft()
            return False
        try:
            call.context.run(call.job)
        except BaseException as error:  # KeyboardInterrupt, too, is for the one who waits
            call.error = error
            self.errors.append((call.what, error))
        self._weight -= call.weight
        self._calls.popleft()
        call.done.release()
        return True


def _work(reference: weakref.ref[Lane], wake: threading.Semaphore) -> None:
    while True:
        wake.acquire()
        lane = reference()
        if lane is None or not lane.turn():
            return
        del lane
