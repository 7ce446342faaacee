"""A sink that raised: what waits for it, and when it is tried again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .._warn import one_line
from ._lane import MAX_WAITING
from ._trouble import Trouble

__all__ = ["QUEUE_BYTES", "TRIES", "Call", "Paused", "room_for"]

QUEUE_BYTES = 64 << 20
"""What records that wait for one sink may take in memory, roughly."""
TRIES = 3
"""So often a call is made whose error is its own; what disks and networks raise is nobody's, and waits."""


@dataclass
class Call:
    """A call of a sink.

    Attributes:
        doing: what it is for, in words.
        make: it.
        weight: records that it hands over.
        size: of these in memory, in bytes.
        failures: times it raised.
    """

    doing: str
    make: Callable[[Any], object]
    weight: int = 0
    size: int = 0
    failures: int = 0


def room_for(call: Call) -> int:
    """Return how many records like a call's may wait."""
    if not call.weight:
        return MAX_WAITING
    return min(MAX_WAITING, max(QUEUE_BYTES // (call.size // call.weight + 1), call.weight))


class Paused:
    """What is to be handed to a sink once it takes something again: bounded; what does not fit is counted.

    Args:
        error: that it raised.
        step: at which.

    Attributes:
        trouble: why, and how long to wait.
        waiting: the calls, in order.
        lost: records that are not to be handed over.
    """

    def __init__(self, error: BaseException, step: int) -> None:
        self.trouble = Trouble(one_line(error), step)
        self.waiting: deque[Call] = deque()
        self.lost = 0

    def hold(self, call: Call) -> None:
        if call.doing == "flushing" and self.waiting:
            return  # what is handed over later is flushed later
        records = sum(held.weight for held in self.waiting)
        if records + call.weight > room_for(call) or len(self.waiting) >= MAX_WAITING:
            self.lost += call.weight
        else:
            self.waiting.append(call)

    def again(self, error: BaseException) -> None:
        """The first call failed once more."""
        self.trouble.again(one_line(error))
        call = self.waiting[0]
        call.failures += 1
        if call.failures >= TRIES and not isinstance(error, OSError):
            self.lost += call.weight
            self.waiting.popleft()

    @property
    def num_records(self) -> int:
        """Records that were not handed over, and those that never will be."""
        return self.lost + sum(call.weight for call in self.waiting)
