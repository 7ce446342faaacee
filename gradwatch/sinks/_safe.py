"""Several sinks behind one door that never harms the training."""

from __future__ import annotations

import atexit
import contextlib
import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ConfigError, GradwatchWarning
from ..protocols import RunMeta, Sink
from ..records import Incident, StepRecord

__all__ = ["SafeSinks"]


class SafeSinks:
    """Hands everything to each sink. One that raises is named in a single warning and left out from then on.

    Satisfies the Sink protocol itself. Two ways to hand over records: `push` every one, and each sink is written at
    its own cadence (`sink.every`, else `log_every`); or `write` at a cadence of one's own.

    Args:
        sinks: in the order they are written.
        log_every: steps between two writes, for sinks that do not ask for a cadence.
        on_error: `"warn"`, or `"raise"` to let errors through (for tests).

    Attributes:
        failed: name of each sink that was left out -> the error.
    """

    def __init__(self, sinks: Sequence[Sink], *, log_every: int = 50, on_error: str = "warn") -> None:
        if on_error not in ("warn", "raise"):
            raise ConfigError(f"SafeSinks: `on_error` must be 'warn' or 'raise'. Got {on_error!r}.")
        if not log_every >= 1:
            raise ConfigError(f"SafeSinks: `log_every` must be at least 1. Got {log_every}.")
        for sink in sinks:
            if not isinstance(sink, Sink):
                raise ConfigError(
                    f"{sink!r} is not a sink: it needs the methods open, write, incident, flush and close."
                )
        self.log_every = log_every
        self.on_error = on_error
        self.failed: dict[str, Exception] = {}
        self._sinks = list(sinks)
        self._windows: dict[int, list[StepRecord]] = {}
        self._unregister: Callable[[], None] | None = None

    @property
    def sinks(self) -> tuple[Sink, ...]:
        """Those that still work."""
        return tuple(self._sinks)

    def __len__(self) -> int:
        return len(self._sinks)

    def add(self, sink: Sink) -> None:
        self._sinks.append(sink)

    def open(self, meta: RunMeta) -> None:
        """Open every sink, and see to it that they are flushed when the interpreter ends without `close`."""
        for sink in self.sinks:
            self._guard(sink, "opening", lambda s: s.open(meta))
        if self._unregister is None:
            self._unregister = _flush_at_exit(self)

    def push(self, record: StepRecord) -> None:
        """Take one record; sinks whose turn it is are written the records since their last write."""
        for sink in self.sinks:
            window = self._windows.setdefault(id(sink), [])
            window.append(record)
            every = getattr(sink, "every", None) or self.log_every
            if (record.step + 1) % every == 0 or len(window) >= every:
                self._drain(sink)

    def write(self, record: StepRecord, window: Sequence[StepRecord] = ()) -> None:
        for sink in self.sinks:
            self._guard(sink, "writing", lambda s: s.write(record, window))

    def incident(self, incident: Incident) -> None:
        for sink in self.sinks:
            self._guard(sink, "writing an incident", lambda s: s.incident(incident))

    def summary(self, text: str) -> None:
        """Hand the words said at the end of the run to the sinks that take them."""
        for sink in self.sinks:
            if hasattr(sink, "summary"):
                self._guard(sink, "writing the summary", lambda s: s.summary(text))

    def annotate(self, **annotation: Any) -> None:
        """Hand an annotation (`text`, `silence`, `paths`, `rules`; or `closing`) to sinks that keep them for replay."""
        for sink in self.sinks:
            if hasattr(sink, "annotate"):
                self._guard(sink, "writing an annotation", lambda s: s.annotate(**annotation))

    def report(self, path: str | os.PathLike[str]) -> None:
        """Hand a file, such as the HTML report, to the sinks that keep files."""
        for sink in self.sinks:
            if hasattr(sink, "report"):
                self._guard(sink, "keeping the report", lambda s: s.report(path))

    def flush(self) -> None:
        for sink in self.sinks:
            self._drain(sink)
            self._guard(sink, "flushing", lambda s: s.flush())

    def close(self) -> None:
        """Write what is left and close every sink. May be called again."""
        for sink in self.sinks:
            self._drain(sink)
            self._guard(sink, "closing", lambda s: s.close())
        if self._unregister is not None:
            self._unregister()
            self._unregister = None

    def _drain(self, sink: Sink) -> None:
        window = self._windows.pop(id(sink), None)
        if window and sink in self._sinks:
            self._guard(sink, "writing", lambda s: s.write(window[-1], window))

    def _guard(self, sink: Sink, doing: str, call: Callable[[Any], None]) -> None:
        try:
            call(sink)
        except Exception as error:
            if self.on_error == "raise":
                raise
            if sink in self._sinks:
                self._leave_out(sink, doing, error)

    def _leave_out(self, sink: Sink, doing: str, error: Exception) -> None:
        self._sinks.remove(sink)
        self._windows.pop(id(sink), None)
        name = type(sink).__name__
        self.failed[name] = error
        with contextlib.suppress(Exception):
            sink.close()
        warnings.warn(
            f"{name} failed while {doing}: {type(error).__name__}: {error}. It gets nothing more; "
            "the training and the other sinks go on.",
            GradwatchWarning,
            stacklevel=2,
        )


def _flush_at_exit(sinks: SafeSinks) -> Callable[[], None]:
    # Weak, so that a forgotten monitor can be collected; by process, so that a forked worker flushes nothing twice.
    reference, pid = weakref.ref(sinks), os.getpid()

    def flush() -> None:
        alive = reference()
        if alive is not None and os.getpid() == pid:
            alive.flush()

    atexit.register(flush)
    return lambda: atexit.unregister(flush)
