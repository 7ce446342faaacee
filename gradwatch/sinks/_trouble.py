"""A disk that does not take what it is given: how long to wait, and what to say."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic

from .._warn import one_line

__all__ = ["Trouble", "reason"]

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 60.0


def reason(error: BaseException) -> str:
    """Return why a write failed, in the system's words where it has any."""
    words = error.strerror if isinstance(error, OSError) else None
    if not words:
        return one_line(error)
    return words if words[:2].isupper() else words[0].lower() + words[1:]


@dataclass
class Trouble:
    """Writes fail. They are tried again after pauses that double, up to a minute.

    Attributes:
        why: they fail, in words.
        step: the first that could not be written.
    """

    why: str
    step: int
    _pause: float = FIRST_PAUSE
    _until: float = 0.0

    def __post_init__(self) -> None:
        self._until = monotonic() + self._pause

    @property
    def is_pausing(self) -> bool:
        return monotonic() < self._until

    @property
    def seconds_left(self) -> float:
        return max(self._until - monotonic(), 0.0)

    def now(self) -> None:
        """Let it be tried at once."""
        self._until = 0.0

    def again(self, why: str) -> None:
        """It failed once more."""
        self.why = why
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._until = monotonic() + self._pause
