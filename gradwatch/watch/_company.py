"""Who steps in turns with a training: other watched ones of the same program, and other optimizers of its own."""

from __future__ import annotations

from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor

from ._numbers import Scalars

__all__ = ["Company", "LossOfOthers"]


class LossOfOthers:
    """Remembers the last loss of each optimizer that steps on its own, for the others to stand beside."""

    def __init__(self) -> None:
        self._last: dict[int, Tensor | float] = {}

    def told(self, optimizer: int | None, loss: Tensor | float | None) -> Scalars:
        """Take in a step's loss; return the last one of another optimizer, if one has given any."""
        if optimizer is None or loss is None:
            return {}
        self._last.pop(optimizer, None)
        others = list(self._last.values())[-1:]
        self._last[optimizer] = loss
        return {"others_loss": others[0]} if others else {}


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
