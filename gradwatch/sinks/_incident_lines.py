"""incidents.jsonl: one line whenever an incident has changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..records import Incident
from ._lines import Lines
from ._plain import sealed

__all__ = ["IncidentKey", "IncidentLines", "incident_key"]

IncidentKey = tuple[int, str, int]


def incident_key(incident: Incident) -> IncidentKey:
    """Return what tells incidents apart. The id alone does not: engines of several optimizers each count from 0."""
    return incident.id, incident.name or incident.rule, incident.first_step


class IncidentLines(Lines):
    """Appends incidents to a file of JSON lines.

    One that merely goes on (`last_step`, `count`, `value`, further paths) is written with the next flush, so that an
    incident that lasts for thousands of steps does not become thousands of lines.
    """

    def __init__(self, path: Path, *, session: int) -> None:
        super().__init__(path)
        self.session = session
        self._said: dict[IncidentKey, Incident] = {}
        self._held: dict[IncidentKey, Incident] = {}

    def note(self, incident: Incident) -> bool:
        """Take what is said of an incident; return whether it is news that should be written at once."""
        key = incident_key(incident)
        before = self._said.get(key)
        self._held.pop(key, None)
        if before is not None and self._essence(before) == self._essence(incident):
            if incident != before:
                self._held[key] = incident
            return False
        self._say(incident)
        return True

    def release(self) -> None:
        """Let those go out, too, that merely went on."""
        for key, incident in list(self._held.items()):
            self._say(incident)
            self._held.pop(key, None)

    def _say(self, incident: Incident) -> None:
        # Last what makes it said: Ctrl-C in between must not make it so.
        self.add(sealed({**incident.to_json(), "session": self.session}))
        self._said[incident_key(incident)] = incident

    @staticmethod
    def _essence(incident: Incident) -> Incident:
        # 0 for the numbers that move on: nan would not even equal itself.
        return replace(incident, last_step=0, count=0, value=0.0, limit=0.0, message="", paths=())
