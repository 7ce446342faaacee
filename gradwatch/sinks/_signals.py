"""SIGTERM: what is on record is saved, then it goes where it would have gone."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from contextlib import suppress
from types import FrameType
from typing import Any, Protocol

__all__ = ["off_termination", "on_termination"]


class Saved(Protocol):
    """What has something to save."""

    def terminated(self) -> None: ...


_open: weakref.WeakSet[Any] = weakref.WeakSet()
_before: Any = None
_pid = -1


def on_termination(folder: Saved) -> None:
    """Let a run folder be told of SIGTERM for as long as it lives; the handler that was there is called after that.

    Does nothing outside the main thread, nor where SIGTERM is ignored. Who sets a handler of their own later has it
    alone, unless they call the one they found, as is usual.
    """
    global _before, _pid
    if threading.current_thread() is not threading.main_thread():
        return
    _open.add(folder)
    handler = signal.getsignal(signal.SIGTERM)
    # None: it was not set from Python, and can't be put back.
    if handler is _handle or handler is None or handler == signal.SIG_IGN:
        return
    _before, _pid = handler, os.getpid()
    with suppress(ValueError, OSError):
        signal.signal(signal.SIGTERM, _handle)


def off_termination(folder: Saved) -> None:
    """Forget a run folder; with the last one the handler that was there before is put back, and let go of: a trainer's
    holds the trainer."""
    global _before
    _open.discard(folder)
    is_main = threading.current_thread() is threading.main_thread()
    if _open or not is_main:
        return
    now = signal.getsignal(signal.SIGTERM)
    if now is _handle:
        with suppress(ValueError, OSError):
            signal.signal(signal.SIGTERM, _before)
    if now is _handle or not callable(now):
        # Nobody can call ours any more. One that was put in its place may, and finds the one before it still.
        _before = None


def _handle(number: int, frame: FrameType | None) -> None:
    if os.getpid() == _pid:  # not in a forked child: its folders are its parent's
        for folder in list(_open):
            with suppress(Exception):
                folder.terminated()
    if callable(_before):
        _before(number, frame)
    else:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
