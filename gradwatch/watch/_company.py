"""Other watched trainings of the same program that step in turns with this one: a generator's and its critic's."""

from __future__ import annotations

from weakref import WeakKeyDictionary, WeakSet

__all__ = ["Company"]


class Company:
    """Counts the steps of one training, and tells which others have stepped meanwhile."""

    def __init__(self) -> None:
        self._trains = 0
        self._num_steps = 0
        self._known: WeakKeyDictionary[Company, int] = WeakKeyDictionary()
        _ALL.add(self)

    def step(self, trains: int) -> int:
        """Count a step; return how many trainings of other parameters have stepped since the last one.

        Args:
            trains: identity of the first parameter that is trained: two may watch one training.
        """
        self._trains = trains
        self._num_steps += 1
        if len(_ALL) < 2:
            return 0
        found = 0
        for other in list(_ALL):
            if other is not self and other._trains not in (0, trains):
                found += other._num_steps > self._known.get(other, other._num_steps)
                self._known[other] = other._num_steps
        return found


_ALL: WeakSet[Company] = WeakSet()
