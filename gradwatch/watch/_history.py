"""The recent records, within a bound of memory."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import islice

from ..records import NUM_BINS, StepRecord

__all__ = ["History"]

LEAST = 16
"""Records that are kept whatever they take."""
_BYTES_A_HISTOGRAM = NUM_BINS * 8 + 256


class History(deque[StepRecord]):
    """As many of the last records as were asked for, and as fit.

    Where they don't fit, histograms are let go of first, the oldest ones first, then the oldest records. The newest
    record is always whole.

    Args:
        most: records.
        room: bytes that their columns and histograms may take.
    """

    def __init__(self, most: int, room: int) -> None:
        super().__init__(maxlen=most)
        self._room = room
        self._sizes: deque[int] = deque(maxlen=most)
        self._taken = 0
        # How many of the oldest have no histograms any more.
        self._num_plain = 0

    def append(self, record: StepRecord) -> None:
        """Add the newest one."""
        if len(self) == self.maxlen:
            self._forget_oldest()
        super().append(record)
        self._sizes.append(_size(record))
        self._taken += self._sizes[-1]
        if self._taken > self._room:
            self._make_room()

    def _make_room(self) -> None:
        last = len(self) - 1
        for place, record in enumerate(islice(self, self._num_plain, last), self._num_plain):
            if self._taken <= self._room:
                return
            self._num_plain = place + 1
            if record.histograms:
                self[place] = replace(record, histograms={})
                self._taken -= self._sizes[place]
                self._sizes[place] = _size(self[place])
                self._taken += self._sizes[place]
        while self._taken > self._room and len(self) > LEAST:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        self.popleft()
        self._taken -= self._sizes.popleft()
        self._num_plain = max(0, self._num_plain - 1)


def _size(record: StepRecord) -> int:
    arrays = (*record.columns.values(), *record.masks.values())
    return sum(array.nbytes for array in arrays) + len(record.histograms) * _BYTES_A_HISTOGRAM
