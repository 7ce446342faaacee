"""Learning that a trainer's loop was left, where the trainer has no event for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

__all__ = ["is_running", "when_left"]


def when_left(function: str, package: str, method: Callable[[], Any]) -> None:
    """Call a bound method when the trainer's function that runs now is left, also by an exception or Ctrl-C.

    Something of ours is put among the function's local variables and goes with them: when it returns, or, after an
    exception, when nobody holds the traceback any more.

    Args:
        function: name of the trainer's function that is running; of several the outermost counts. Where none is,
            nothing happens.
        package: that the function is of.
        method: kept as long as that frame lives, and called once, in whatever state the program is: it must not raise.
    """
    found = _frame(function, package)
    if found is not None:
        found.f_locals[f"gradwatch {id(method.__self__)}"] = _Goes(method)  # type: ignore[attr-defined]


def is_running(function: str, package: str) -> bool:
    """Whether this thread is inside a trainer's function."""
    return _frame(function, package) is not None


def _frame(function: str, package: str) -> FrameType | None:
    frame, found = sys._getframe(1) if hasattr(sys, "_getframe") else None, None
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if frame.f_code.co_name == function and module.partition(".")[0] == package:
            found = frame
        frame = frame.f_back
    return found


class _Goes:
    def __init__(self, method: Callable[[], Any]) -> None:
        # Not weakly: what goes together with its object, in a cycle, would find it gone.
        self._method = method

    def __del__(self) -> None:
        if not sys.is_finalizing():
            with suppress(Exception):
                self._method()
