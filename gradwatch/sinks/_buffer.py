"""Records that are not known to be written yet: bounded, and thinner before any is let go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..records import NUM_BINS, StepRecord

__all__ = ["Buffer", "Held", "size_of"]

SCALARS_BYTES = 600
"""A record without columns, roughly."""


def size_of(record: StepRecord) -> int:
    """Return what a record takes in memory, in bytes, roughly."""
    size = SCALARS_BYTES + 8 * len(record.index) * len(record.columns)
    if not record.histograms:
        return size
    return size + getattr(record.histograms, "nbytes", 8 * NUM_BINS * len(record.histograms))


@dataclass(slots=True)
class Held:
    """A record, its number in the session, the index file that it refers to; and what never came before it, and why."""

    number: int
    record: StepRecord
    index: int
    is_thinned: bool = False
    is_journalled: bool = False
    gap: dict[str, Any] | None = None

    @property
    def size(self) -> int:
        return size_of(self.record)

    @property
    def is_telling(self) -> bool:
        """Whether something happened at this step: its columns go last."""
        return bool(self.record.skipped or self.record.unseen or any(t.applied for t in self.record.treatments))


class Buffer:
    """Holds records in order. Beyond its limit, columns of ordinary steps go first, then all columns, then the oldest
    records.

    Args:
        limit_bytes: for all together.

    Attributes:
        held: the records, oldest first.
        size: of all, in bytes, roughly.
        dropped: records that were let go, and are not in the journal either, since the last time somebody asked.
        has_dropped: any was let go.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held: list[Held] = []
        self.size = 0
        self.dropped = 0
        self.has_dropped = False
        self._telling: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.held)

    def add(self, held: Held) -> None:
        self.held.append(held)
        self.size += held.size
        if self.size > self.limit_bytes:
            self._shrink()

    def take(self) -> list[Held]:
        """Return all of them, and hold none."""
        taken, self.held, self.size = self.held, [], 0
        return taken

    def give_back(self, taken: Sequence[Held]) -> None:
        """Hold again what could not be written, before what came meanwhile."""
        self.held[:0] = taken
        self.size = sum(held.size for held in self.held)
        if self.size > self.limit_bytes:
            self._shrink()

    def note_incident(self, step: int) -> None:
        """Keep the columns about a step longer than others."""
        self._telling = (*self._telling, step)[-256:]

    def _shrink(self) -> None:
        # Down to three quarters, so that it is not done at every record.
        goal = self.limit_bytes * 3 // 4
        for all_of_them in (False, True):
            for held in self.held[:-1]:
                if self.size <= goal:
                    return
                if not held.is_thinned and (all_of_them or not self._is_telling(held)):
                    self._thin(held)
        count = 0
        while self.size > goal and count < len(self.held) - 1:
            self.size -= self.held[count].size
            self.dropped += not self.held[count].is_journalled
            count += 1
        self.has_dropped = self.has_dropped or count > 0
        del self.held[:count]

    def _thin(self, held: Held) -> None:
        self.size -= held.size
        held.record = replace(held.record, columns={}, masks={}, histograms={})
        held.is_thinned = True
        self.size += held.size

    def _is_telling(self, held: Held) -> bool:
        step = held.record.step
        return held.is_telling or any(-16 <= step - about <= 16 for about in self._telling)
