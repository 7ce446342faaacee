"""Records kept in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..errors import ConfigError
from ..protocols import RunMeta, Sink
from ..records import Incident, StepRecord
from ._incident_lines import IncidentKey, incident_key

__all__ = ["MemorySink"]


class MemorySink(Sink):
    """A sink that keeps what it is given: for tests and notebooks.

    Args:
        max_records: how many of the newest to keep; None: all.

    Attributes:
        every: each record counts.
        meta: of the last `open`, or None.
        records: every record, the oldest first.
        incidents: the latest state of each incident, by the order they began.
        text: the words said at the end.
        closed: `close` was called.
    """

    every = 1
    never_hangs = True

    def __init__(self, *, max_records: int | None = None) -> None:
        if max_records is not None and not max_records > 0:
            raise ConfigError(f"MemorySink: `max_records` must be above 0 or None. Got {max_records}.")
        self.meta: RunMeta | None = None
        self.records: deque[StepRecord] = deque(maxlen=max_records)
        self.text = ""
        self.closed = False
        self._incidents: dict[IncidentKey, Incident] = {}

    @property
    def incidents(self) -> list[Incident]:
        return list(self._incidents.values())

    @property
    def steps(self) -> list[int]:
        return [r.step for r in self.records]

    def open(self, meta: RunMeta) -> None:
        self.meta, self.closed = meta, False

    def write(self, record: StepRecord, window: Sequence[StepRecord] = ()) -> None:
        self.records.extend(r for r in window if r is not record)
        self.records.append(record)

    def incident(self, incident: Incident) -> None:
        self._incidents[incident_key(incident)] = incident

    def summary(self, text: str) -> None:
        self.text = text

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self.closed = True
