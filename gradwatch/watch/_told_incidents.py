"""Incidents as they are told: to the sinks, with a flight recorder where one is due, and to the user in lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..records import Incident
from ..sinks import SafeSinks
from ._case_files import CaseFiles
from ._engine import ALARMS, Engine
from ._flight import write_flight
from ._ranks import is_writer

__all__ = ["MAX_LINES", "ToldIncidents"]

MAX_LINES = 30
"""Incident lines printed in one run; what comes after is in the summary and the run folder."""


class ToldIncidents:
    """Tells of incidents when their step is complete: by then it stands with them what was done about it.

    Args:
        run_dir: folder for flight recorders; None: none are written.
        say: shows one line to the user.
        cases: of the run.
    """

    def __init__(self, run_dir: Path | None, say: Callable[[str], None], cases: CaseFiles) -> None:
        self.say = say
        self._cases = cases
        self._run_dir = run_dir
        self._num_lines = 0
        self._said: set[tuple[int, str]] = set()
        self._news: dict[tuple[int, str], Incident] = {}

    @property
    def has_news(self) -> bool:
        return bool(self._news)

    def note(self, incident: Incident) -> None:
        """Keep an incident that has opened, changed or ended, until `tell`."""
        self._news[incident.id, incident.rule] = incident

    def tell(self, engine: Engine, sinks: SafeSinks) -> None:
        """Tell of what was noted, as it stands now."""
        now = {(i.id, i.rule): i for i in engine.judge.incidents}
        for key, noted in list(self._news.items()):
            try:
                self._tell_one(key, now.get(key, noted), engine, sinks)
            except Exception:
                self._is_told(key, noted)
                raise
            self._is_told(key, noted)  # what Ctrl-C stops before this is told by the next call

    def _is_told(self, key: tuple[int, str], noted: Incident) -> None:
        if self._news.get(key) is noted:  # nothing newer came of it meanwhile
            del self._news[key]

    def _tell_one(self, key: tuple[int, str], incident: Incident, engine: Engine, sinks: SafeSinks) -> None:
        if key not in self._said and incident.rule in ALARMS:
            incident = self._record_flight(incident, engine)
        sinks.incident(incident)
        if key in self._said and not incident.resolved:
            return
        is_new = key not in self._said
        if is_new and incident.severity != "info" and is_writer():
            self.print(incident)
        self._said.add(key)
        if is_new:  # it may have more to say
            with engine.guard("case files"):
                self._cases.open(incident, sinks)

    def _record_flight(self, incident: Incident, engine: Engine) -> Incident:
        if self._run_dir is None or not is_writer() or len(self._said) >= MAX_LINES:
            return incident
        with engine.guard("the flight recorder"):
            autopsy = engine.autopsy
            engine.catch_up()
            path = write_flight(
                self._run_dir, incident, list(engine.completion.history), autopsy.modules if autopsy else ()
            )
            details = {"flight_recorder": path.name}
            engine.judge.explain(incident, details)
            return replace(incident, details={**incident.details, **details})
        return incident

    def print(self, incident: Incident | str) -> None:
        """Show one line, as long as there are not too many."""
        if self._num_lines < MAX_LINES:
            self.say(f"gradwatch {incident}")
        elif self._num_lines == MAX_LINES:
            self.say("gradwatch: further incidents are not printed; see the summary.")
        self._num_lines += 1
