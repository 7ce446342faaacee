"""A cell of a notebook that shows the run while it trains."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from time import monotonic
from typing import Any

from .._text import printable
from .._warn import log
from ..errors import ConfigError
from ..protocols import RunMeta, Sink
from ..records import Incident, Incidents, StepRecord, Verdict
from ..sinks import IncidentKey, incident_key
from ._card import RunCard
from ._series import Series

__all__ = ["LiveCell", "in_notebook"]

SHARE = 0.01
"""Of the training's time that drawing may take at most."""


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook. IPython is not imported for the answer."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    # In a terminal there is a shell too, but no front end that shows HTML; in a fork a kernel that can't be reached.
    kernel = getattr(shell, "kernel", None)
    owner = getattr(getattr(kernel, "session", None), "pid", os.getpid())
    return kernel is not None and owner == os.getpid()


@contextmanager
def _streams_behind_rich() -> Iterator[None]:
    """Put the kernel's own stdout and stderr in the place of what a progress bar of rich has put there.

    A kernel flushes them before it shows something. rich's stand-in answers by showing what it holds (half a line that
    the program has printed), for which the kernel flushes it: to the recursion limit, and each time it is shown.
    """
    with ExitStack() as stack:
        for name, redirect in (("stdout", redirect_stdout), ("stderr", redirect_stderr)):
            behind = getattr(getattr(sys, name), "rich_proxied_file", None)
            if behind is not None:
                stack.enter_context(redirect(behind))
        yield


class LiveCell(Sink):
    """Shows loss, norms, incidents and layers below the cell that trains, and draws them anew as the run goes on.

    It holds a few hundred points whatever the length of the run, and one display that it replaces. It draws in the
    thread that trains, so seldom that drawing takes at most a hundredth of the time. Outside of a notebook it does
    nothing.

    Args:
        seconds: between two drawings, at least.

    Raises:
        ConfigError: `seconds` is not above 0.
    """

    every: int | None = 1
    never_hangs = True  # a kernel hands what it shows to a thread of its own

    def __init__(self, seconds: float = 2.0) -> None:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
            raise ConfigError(
                f"a live cell (`live=`) takes the seconds between two drawings, above 0. Got {seconds!r}."
            )
        self.seconds = float(seconds)
        self._handle: Any = None
        self._begin("")

    def _begin(self, model: str) -> None:
        self._model = model
        self._series = Series()
        self._incidents: dict[IncidentKey, Incident] = {}
        self._verdict: Verdict | None = None
        self._pause = self.seconds
        self._last_drawn = monotonic()
        self._num_skipped = 0

    def open(self, meta: RunMeta) -> None:
        """Show an empty card, where this is a notebook; a run that goes on keeps its own."""
        if self._handle is not None:
            return
        if not in_notebook():
            log("a live cell is shown in notebooks only: this process is no notebook's kernel.")
            return
        from IPython.display import display

        self._begin(meta.model)
        with _streams_behind_rich():
            self._handle = display(self._bundle(), raw=True, display_id=True)

    def write(self, record: StepRecord, window: Sequence[StepRecord] = ()) -> None:
        """Take what was measured; draw where it is time."""
        if self._handle is None:
            return
        for each in window or (record,):
            self._series.add(each)
            self._num_skipped += each.skipped
        if monotonic() - self._last_drawn >= self._pause:
            self.flush()

    def incident(self, incident: Incident) -> None:
        """Keep it for the next drawing."""
        self._incidents[incident_key(incident)] = incident

    def judged(self, verdict: Verdict, ended: str) -> None:
        """Keep what can be said at the end."""
        self._verdict = verdict

    def flush(self) -> None:
        """Draw what is known now."""
        if self._handle is None:
            return
        began = monotonic()
        with _streams_behind_rich():
            self._handle.update(self._bundle(), raw=True)
        self._last_drawn = monotonic()
        self._pause = max(self.seconds, (self._last_drawn - began) / SHARE)

    def close(self) -> None:
        """Draw the last state; the cell keeps it, and what drew it is let go of."""
        self.flush()
        self._handle = None
        self._begin("")

    def _bundle(self) -> dict[str, str]:
        """Return the card by media type: as text where there is no HTML."""
        incidents = list(self._incidents.values())
        if self._verdict is not None:
            shown = RunCard.of(self._verdict, self._series, incidents, facts=self._facts())
        else:
            num_open = sum(not incident.resolved for incident in incidents)
            tone = "bad" if num_open else "unseen"
            shown = RunCard(
                headline=self._so_far(num_open),
                tone=tone,
                series=self._series,
                incidents=incidents,
                facts=self._facts(),
            )
        text = f"{shown.headline}\n{Incidents(incidents)}" if incidents else shown.headline
        return {"text/html": shown.html(), "text/plain": printable(text)}

    def _so_far(self, num_open: int) -> str:
        if not len(self._series):
            return f"gradwatch waits for the first step of {self._model or 'the model'}"
        count = len(self._incidents)
        told = f"{count} incident{'' if count == 1 else 's'}, {num_open} open" if count else "no incident so far"
        return f"running, step {self._series.last_step:,}: {told}"

    def _facts(self) -> list[str]:
        steps = f"{self._model}, steps to {self._series.last_step:,}" if len(self._series) else ""
        skipped = f"; the optimizer was kept from moving at {self._num_skipped:,} of them" if self._num_skipped else ""
        return [steps + skipped] if self._verdict is not None and steps else []
