"""Incidents to a callable or a webhook, out of the training's way."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import Full, Queue
from time import monotonic
from typing import Any

from .._address import checked_address, host_of, post
from .._warn import one_line, warn
from ..errors import ConfigError, GradwatchError
from ..protocols import RunMeta, Sink
from ..records import SEVERITIES, Incident, StepRecord
from ._incident_lines import IncidentKey, incident_key
from ._plain import dumps

__all__ = ["NotifySink"]


class NotifySink(Sink):
    """Tells a Python callable or a webhook of each incident that begins, from a thread of its own.

    The training only ever puts an incident into a bounded queue. What comes too fast, or while the target hangs, is
    dropped and counted. A target that fails three times running is given up.

    Args:
        target: `f(incident)`, or a URL that takes a POST of JSON: the fields of the incident, a sentence as `text`,
            the `run`'s name, and how many were `dropped` before it.
        severity: the least that is told: "info", "warning", "critical".
        resolved: tell when an incident is over, too.
        max_per_minute: more are dropped.
        timeout: seconds for one POST, and for `close` to wait for what is still in the queue.
        queue_size: incidents that may wait.

    Attributes:
        dropped: incidents not told so far.
        sent: incidents told so far.
    """

    every: int | None = None

    def __init__(
        self,
        target: Callable[[Incident], Any] | str,
        *,
        severity: str = "warning",
        resolved: bool = False,
        max_per_minute: int = 10,
        timeout: float = 5.0,
        queue_size: int = 100,
    ) -> None:
        if not callable(target):
            if not str(target).startswith(("http:", "https:")):
                raise ConfigError(f"NotifySink tells a callable or an http(s) URL. Got {target!r}.")
            checked_address(str(target), where="NotifySink")
        if severity not in SEVERITIES:
            raise ConfigError(f"NotifySink: `severity` must be one of {', '.join(SEVERITIES)}. Got {severity!r}.")
        for name, value in (("max_per_minute", max_per_minute), ("timeout", timeout), ("queue_size", queue_size)):
            if not value > 0:
                raise ConfigError(f"NotifySink: `{name}` must be above 0. Got {value}.")
        self.target = target
        self._settings: dict[str, Any] = {
            "severity": severity,
            "resolved": resolved,
            "max_per_minute": max_per_minute,
            "timeout": timeout,
            "queue_size": queue_size,
        }
        self.dropped = 0
        self.sent = 0
        self._name = "gradwatch"
        self._told: set[tuple[IncidentKey, str, bool]] = set()
        self._recent: deque[float] = deque()
        self._queue: Queue[tuple[Incident, int] | None] = Queue(queue_size)
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._failures = 0
        self._hangs = self._has_complained = False
        self._error: Exception | None = None
        self._last: Exception | None = None

    def __reduce__(self) -> Any:
        return partial(type(self), **self._settings), (self.target,)

    def open(self, meta: RunMeta) -> None:
        self._name, self._failures = meta.name, 0

    def write(self, record: StepRecord, window: Sequence[StepRecord] = ()) -> None:
        """Records are no news."""

    def incident(self, incident: Incident) -> None:
        """Queue what is news: an incident that began, became more severe, or (if asked for) is over.

        Raises:
            GradwatchError: the target failed three times running; said once.
        """
        self._complain()
        news = (incident_key(incident), incident.severity, incident.resolved)
        least = SEVERITIES.index(self._settings["severity"])
        if SEVERITIES.index(incident.severity) < least or news in self._told:
            return
        self._told.add(news)
        if incident.resolved and not self._settings["resolved"]:
            return
        now = monotonic()
        while self._recent and now - self._recent[0] > 60:
            self._recent.popleft()
        if len(self._recent) >= self._settings["max_per_minute"] or os.getpid() != self._pid:
            self.dropped += 1
            return
        try:
            self._queue.put_nowait((incident, self.dropped))
        except Full:
            self.dropped += 1
            return
        self._recent.append(now)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="gradwatch-notify", daemon=True)
            self._thread.start()

    def flush(self) -> None:
        """Nothing to wait for: the thread delivers."""

    def close(self) -> None:
        """Wait, no longer than the timeout, until what is queued was told."""
        thread, self._thread = self._thread, None
        if thread is None or os.getpid() != self._pid:
            return
        try:
            self._queue.put(None, timeout=self._settings["timeout"])
            thread.join(self._settings["timeout"])
        except Full:
            pass  # it hangs: a daemon thread, which ends with the process
        if thread.is_alive():
            self._hangs = True
        # Too few incidents for three failures running, but one was not told.
        self._error = self._error or (self._last if self._failures else None)
        self._complain()

    def _complain(self) -> None:
        error, self._error = self._error, None
        where = host_of(self.target) if isinstance(self.target, str) else _name(self.target)
        if error is not None and not self._has_complained:
            self._has_complained = True
            times = ("once", "twice", "three times running")[min(self._failures, 3) - 1]
            raise GradwatchError(f"telling {where} of incidents failed {times}: {one_line(error)}") from error
        if self._hangs and not self._has_complained:
            self._has_complained = True
            seconds, waiting = self._settings["timeout"], max(self._queue.qsize() - 1, 0) + 1
            warn(f"{where} was told of an incident and has not come back in {seconds:g} s; {waiting} were not told.")

    def _work(self) -> None:
        while True:
            job = self._queue.get()
            if job is None:
                return
            try:
                self._tell(*job)
            except Exception as error:
                self._failures += 1
                self._last = error
                self.dropped += 1
                if self._failures == 3:
                    self._error = error
                    return
            else:
                self._failures = 0
                self.sent += 1

    def _tell(self, incident: Incident, dropped: int) -> None:
        if not isinstance(self.target, str):
            self.target(incident)
            return
        words = {**incident.to_json(), "text": str(incident), "run": self._name, "dropped": dropped}
        post(self.target, dumps(words).encode(), timeout=self._settings["timeout"])


def _name(target: Callable[[Incident], Any]) -> str:
    """Return what a callable is called, in a few characters."""
    name = one_line(getattr(target, "__qualname__", None) or repr(target))
    return name if len(name) <= 60 else "..." + name[-57:]
