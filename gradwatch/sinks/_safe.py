"""Several sinks behind one door that never harms the training."""

from __future__ import annotations

import atexit
import contextlib
import os
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .._adopt import original
from .._closing import end_all
from .._warn import one_line, warn
from ..errors import ConfigError, GradwatchError
from ..protocols import RunMeta, Sink, as_sink
from ..records import CaseFile, Incident, StepRecord, Verdict
from ._buffer import size_of
from ._lane import PATIENCE, Lane
from ._paused import TRIES, Call, Paused, room_for
from ._run_folder import RunFolder

__all__ = ["SafeSinks"]


CLOSE_SECONDS = 10.0
"""How long a sink that blocks is waited for when the run ends."""


class SafeSinks(Sink):
    """Hands everything to each sink. One that raises is named in a warning, and tried again after pauses that grow.

    What comes meanwhile waits for it, up to a bound; what did not fit is told when it goes on, or when the run ends.
    One that gives up by itself (`GradwatchError`), or fails as it is closed, is left out from then on; so is the run
    folder, which tries again by itself.

    Each has a thread of its own (but those that say that they never hang). A call is waited for as long as the sink is
    quick; one that blocks holds the training for a quarter of a second, once, and is then handed what comes by a
    bounded queue. What did not fit, or was not taken when the run ended, is counted and told.

    Satisfies the Sink protocol itself. Two ways to hand over records: `push` every one, and each sink is written at
    its own cadence (`sink.every`, else `log_every`); or `write` at a cadence of one's own.

    Args:
        sinks: in the order they are written.
        log_every: steps between two writes, for sinks that do not ask for a cadence.
        on_error: `"warn"`, or `"raise"` to let errors through (for tests).

    Attributes:
        failed: name of each sink that fails, or was left out -> the error.
        recording_failed: why the run folder was left out; "" where it was not.
    """

    def __init__(self, sinks: Sequence[Sink], *, log_every: int = 50, on_error: str = "warn") -> None:
        if on_error not in ("warn", "raise"):
            raise ConfigError(f"SafeSinks: `on_error` must be 'warn' or 'raise'. Got {on_error!r}.")
        if not log_every >= 1:
            raise ConfigError(f"SafeSinks: `log_every` must be at least 1. Got {log_every}.")
        self.log_every = log_every
        self.on_error = on_error
        self.failed: dict[str, Exception] = {}
        self.recording_failed = ""
        self._sinks = [as_sink(sink) for sink in sinks]
        self._hanging: list[Sink] = []
        self._lanes: dict[int, Lane] = {}
        self._told_slow: set[int] = set()
        self._paused: dict[int, Paused] = {}
        self._missed: dict[str, int] = {}
        self._step = -1
        self._windows: dict[int, list[StepRecord]] = {}
        self._unregister: Callable[[], None] | None = None

    @property
    def sinks(self) -> tuple[Sink, ...]:
        """Those that still work."""
        return tuple(original(sink) for sink in self._sinks if id(sink) not in self._paused)

    @property
    def notes(self) -> list[str]:
        """Which fail, were left out, or missed something, in sentences."""
        off = [f"sink {name} failed: {one_line(error)}" for name, error in self.failed.items()]
        return off + [f"sink {name} missed records: {count:,}" for name, count in self._missed.items() if count]

    @property
    def trouble(self) -> str:
        """Why not all of the run is on record; "" where all of it is."""
        return self.recording_failed or next((sink.trouble for sink in self._sinks if sink.trouble), "")

    def __len__(self) -> int:
        return len(self._sinks)

    def add(self, sink: Sink) -> None:
        self._sinks.append(as_sink(sink))

    def open(self, meta: RunMeta) -> None:
        """Open every sink, and see to it that they are flushed when the interpreter ends without `close`."""
        self._each("opening", lambda s: s.open(meta))
        if self._unregister is None:
            self._unregister = _flush_at_exit(self)

    def push(self, record: StepRecord) -> None:
        """Take one record; sinks whose turn it is are written the records since their last write."""
        for sink in tuple(self._sinks):
            self._step = record.step
            window = self._windows.setdefault(id(sink), [])
            if not window or window[-1] is not record:
                window.append(record)
            every = sink.every or self.log_every
            if (record.step + 1) % every == 0 or len(window) >= every:
                self._drain(sink)

    def write(self, record: StepRecord, window: Sequence[StepRecord] = ()) -> None:
        self._step = record.step
        for sink in tuple(self._sinks):
            self._write(sink, record, window)

    def incident(self, incident: Incident) -> None:
        self._each("writing an incident", lambda s: s.incident(incident))

    def case(self, case: CaseFile, batch: bytes | None = None) -> None:
        self._each("writing a case file", lambda s: s.case(case, batch))

    def resumed(self, step: int) -> None:
        self._each("saying where the run goes on", lambda s: s.resumed(step))

    def summary(self, text: str) -> None:
        self._each("writing the summary", lambda s: s.summary(text))

    def annotate(self, **annotation: Any) -> None:
        self._each("writing an annotation", lambda s: s.annotate(**annotation))

    def judged(self, verdict: Verdict, ended: str) -> None:
        self._each("writing what was judged", lambda s: s.judged(verdict, ended))

    def report(self, path: str | os.PathLike[str]) -> None:
        self._each("keeping the report", lambda s: s.report(path))

    def ended(self, why: str) -> None:
        self._each("writing how the run ended", lambda s: s.ended(why))

    def flush(self) -> None:
        for sink in tuple(self._sinks):
            self._drain(sink)
            self._guard(sink, "flushing", lambda s: s.flush(), patience=CLOSE_SECONDS)

    def at_exit(self) -> None:
        for sink in tuple(self._sinks):
            self._try_at_last(sink)
        self._each("closing", lambda s: s.at_exit())

    @property
    def keeps_early(self) -> bool:
        """Whether any of them wants records before they are judged."""
        return any(type(sink).arrived is not Sink.arrived for sink in self._sinks)

    def arrived(self, record: StepRecord) -> None:
        for sink in tuple(self._sinks):
            if type(sink).arrived is not Sink.arrived and id(sink) not in self._paused:
                self._guard(sink, "writing", lambda s: s.arrived(record))

    def close(self) -> None:
        """Write what is left and close every sink. May be called again; what an interrupt left open is closed then."""
        end_all(*(partial(self._close_one, sink) for sink in tuple(self._sinks)), self._forget_exit)

    def _close_one(self, sink: Sink) -> None:
        if sink in self._hanging:
            return  # it was interrupted once: it may hang
        try:
            self._drain(sink)
            self._try_at_last(sink)
            if sink in self._sinks:
                self._guard(sink, "closing", lambda s: s.close(), patience=CLOSE_SECONDS)
            self._leave_lane(sink)
        except Exception:
            raise
        except BaseException:
            self._hanging.append(sink)
            if sink.never_hangs:
                sink.close()
            raise

    def _forget_exit(self) -> None:
        if self._unregister is not None:
            self._unregister()
            self._unregister = None

    def _drain(self, sink: Sink) -> None:
        window = self._windows.get(id(sink))
        if window and sink in self._sinks:
            self._write(sink, window[-1], window)
        self._windows.pop(id(sink), None)  # what Ctrl-C stops before this is written by the next call

    def _write(self, sink: Sink, record: StepRecord, window: Sequence[StepRecord]) -> None:
        weight = max(len(window), 1)
        self._guard(sink, "writing", lambda s: s.write(record, window), weight=weight, size=weight * size_of(record))

    def _each(self, doing: str, call: Callable[[Sink], None]) -> None:
        for sink in tuple(self._sinks):
            self._guard(sink, doing, call)

    def _guard(
        self,
        sink: Sink,
        doing: str,
        make: Callable[[Any], object],
        *,
        weight: int = 0,
        size: int = 0,
        patience: float = PATIENCE,
    ) -> None:
        call = Call(doing, make, weight, size)
        if id(sink) in self._lanes:
            self._take_errors(sink, self._lanes[id(sink)])
        if sink not in self._sinks:
            return
        paused = self._paused.get(id(sink))
        if paused is not None and not paused.trouble.is_pausing:
            self._try_again(sink, paused)
            paused = self._paused.get(id(sink))
        if sink not in self._sinks:
            return
        if paused is not None:
            paused.hold(call)
            return
        try:
            self._make(sink, call, patience)
        except Exception as error:
            self._fail(sink, call, error)

    def _make(self, sink: Sink, call: Call, patience: float = PATIENCE) -> None:
        if sink.never_hangs:
            call.make(sink)
            return
        lane = self._lanes.get(id(sink))
        if lane is None:
            lane = self._lanes[id(sink)] = Lane()
        try:
            job = partial(call.make, sink)
            lane.call(call, job, weight=call.weight, room=room_for(call), patience=patience)
        finally:
            if lane.is_behind and id(sink) not in self._told_slow:
                self._told_slow.add(id(sink))
                warn(
                    f"{type(sink).__name__} takes its time while {call.doing}: what comes is handed over when it goes "
                    "on; the training and the other sinks don't wait for it.",
                    stacklevel=2,
                )

    def _take_errors(self, sink: Sink, lane: Lane) -> None:
        """Deal with what was raised by calls that nobody waited for."""
        while lane.errors:
            call, error = lane.errors.popleft()
            if not isinstance(error, Exception):
                raise error
            if sink in self._sinks:
                self._fail(sink, call, error)

    def _fail(self, sink: Sink, call: Call, error: Exception) -> None:
        if self.on_error == "raise":
            raise error
        is_folder = isinstance(original(sink), RunFolder)
        if isinstance(error, GradwatchError) or call.doing == "closing" or (is_folder and call.doing != "opening"):
            self._leave_out(sink, call.doing, error)
            return
        name, paused = type(sink).__name__, self._paused.get(id(sink))
        if paused is not None:
            paused.hold(call)
            return
        paused = self._paused[id(sink)] = Paused(error, self._step)
        call.failures = 1
        paused.hold(call)
        self.failed[name] = error.with_traceback(None)
        if is_folder:
            self.recording_failed = one_line(error)
        if name in self._missed:
            return  # it fails now and then, and that was told
        warn(
            f"{name} failed while {call.doing}: {one_line(error).rstrip('.')}. It is tried again after pauses that "
            "grow; the training and the other sinks go on.",
            stacklevel=2,
        )

    def _try_again(self, sink: Sink, paused: Paused) -> Exception | None:
        """Hand over what waits; where it fails once more, the next pause is longer, and the error is returned."""
        while paused.waiting:
            call = paused.waiting[0]
            try:
                self._make(sink, call)
            except Exception as error:
                if isinstance(error, GradwatchError):
                    self._leave_out(sink, call.doing, error)
                    return None
                paused.again(error)
                if call.doing == "opening" and call not in paused.waiting:
                    self._leave_out(sink, call.doing, error)
                return error
            paused.waiting.popleft()
        self._went_on(sink, paused)
        return None

    def _went_on(self, sink: Sink, paused: Paused) -> None:
        name, folder = type(sink).__name__, original(sink)
        del self._paused[id(sink)]
        self.failed.pop(name, None)
        if isinstance(folder, RunFolder):
            self.recording_failed = ""
            folder.missed(paused.lost, paused.trouble.why)
        is_news = name not in self._missed
        self._missed[name] = self._missed.get(name, 0) + paused.lost
        if is_news:
            warn(
                f"{name} failed at step {max(paused.trouble.step, 0):,}: {paused.trouble.why.rstrip('.')}; it went on "
                f"at step {max(self._step, 0):,}; {paused.lost:,} records were not handed to it.",
                stacklevel=2,
            )

    def _try_at_last(self, sink: Sink) -> None:
        """Try a sink that fails once more, as the run ends; then it is left out, and what it did not get is told."""
        paused = self._paused.get(id(sink))
        if paused is None or sink not in self._sinks:
            return
        for _ in range(TRIES):
            error = self._try_again(sink, paused)
            if error is None or isinstance(error, OSError):
                break
        if id(sink) not in self._paused:
            return
        name = type(sink).__name__
        self._missed[name] = self._missed.get(name, 0) + paused.num_records
        self._let_go(sink)
        if paused.num_records:
            warn(
                f"{name} failed to the end: {paused.trouble.why.rstrip('.')}; {self._missed[name]:,} records were not "
                "handed to it.",
                stacklevel=2,
            )

    def _leave_lane(self, sink: Sink) -> None:
        """Say what a sink did not take; its thread ends when it can."""
        lane = self._lanes.pop(id(sink), None)
        if lane is None:
            return
        self._take_errors(sink, lane)
        left = lane.num_waiting
        if left or lane.dropped:
            warn(
                f"{type(sink).__name__} was too slow: {lane.dropped:,} records were never handed to it, and {left:,} "
                "calls were not over when the run ended.",
                stacklevel=2,
            )
        lane.stop()

    def _leave_out(self, sink: Sink, doing: str, error: Exception) -> None:
        name = type(sink).__name__
        self.failed[name] = error.with_traceback(None)  # frames would keep what the sink held
        if isinstance(original(sink), RunFolder):
            self.recording_failed = one_line(error)
        self._let_go(sink)
        warn(
            f"{name} failed while {doing}: {one_line(error).rstrip('.')}. It gets nothing more; "
            "the training and the other sinks go on.",
            stacklevel=2,
        )

    def _let_go(self, sink: Sink) -> None:
        """Close a sink that is to get nothing more."""
        self._sinks.remove(sink)
        self._windows.pop(id(sink), None)
        self._paused.pop(id(sink), None)
        lane = self._lanes.pop(id(sink), None)
        with contextlib.suppress(Exception):
            if lane is None:
                sink.close()
            else:
                lane.call(None, sink.close)
        if lane is not None:
            lane.stop()


def _flush_at_exit(sinks: SafeSinks) -> Callable[[], None]:
    # Weak, so that a forgotten monitor can be collected; by process, so that a forked worker flushes nothing twice.
    reference, pid = weakref.ref(sinks), os.getpid()

    def flush() -> None:
        alive = reference()
        if alive is not None and os.getpid() == pid:
            alive.flush()
            alive.at_exit()

    atexit.register(flush)
    return lambda: atexit.unregister(flush)
