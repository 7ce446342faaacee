"""incidents.jsonl: one line whenever an incident has changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..records import Incident
from ._plain import dumps

__all__ = ["IncidentKey", "IncidentLines", "incident_key"]

IncidentKey = tuple[int, str, int]


def incident_key(incident: Incident) -> IncidentKey:
    """Return what tells incidents apart. The id alone does not: engines of several optimizers each count from 0."""
    return incident.id, incident.name or incident.rule, incident.first_step


class IncidentLines:
    """Appends incidents to a file of JSON lines.

    One that merely goes on (`last_step`, `count`, `value`, further paths) is written with the next flush, so that an
    incident that lasts for thousands of steps does not become thousands of lines.
    """

    def __init__(self, path: Path, *, session: int) -> None:
        self.path = path
        self.session = session
        self._said: dict[IncidentKey, Incident] = {}
        self._held: dict[IncidentKey, Incident] = {}
        # A line that SIGKILL cut short must not swallow the next one.
        if path.exists() and (said := path.read_bytes()) and not said.endswith(b"\n"):
            with path.open("ab") as file:
                file.write(b"\n")

    def add(self, incident: Incident) -> None:
        key = incident_key(incident)
        before = self._said.get(key)
        self._held.pop(key, None)
        if before is not None and self._essence(before) == self._essence(incident):
            if incident != before:
                self._held[key] = incident
            return
        self._write([incident])

    def flush(self) -> None:
        held, self._held = list(self._held.values()), {}
        self._write(held)

    def _write(self, incidents: list[Incident]) -> None:
        if not incidents:
            return
        lines = "".join(dumps({**i.to_json(), "session": self.session}) + "\n" for i in incidents)
        with self.path.open("ab", buffering=0) as file:
            file.write(lines.encode())
        self._said.update({incident_key(i): i for i in incidents})

    @staticmethod
    def _essence(incident: Incident) -> Incident:
        # 0 for the numbers that move on: nan would not even equal itself.
        return replace(incident, last_step=0, count=0, value=0.0, limit=0.0, message="", paths=())
