"""How much each rule judged, part by part of a run: a few numbers, however long it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

__all__ = ["Strips"]

MOST = 48
WIDTH = 16


class Strips:
    """Looks at the rules' counts of judgements now and then; parts grow so that there are never more than `MOST`.

    Args:
        count: records shown so far: of a run that is gone on from. Its parts are not known.
        judged: how often each rule had judged by then.

    Attributes:
        count: records shown so far.
    """

    def __init__(self, count: int = 0, judged: Sequence[int] = ()) -> None:
        self.count = count
        self._width = WIDTH
        self._due = count + WIDTH
        self._marks: list[tuple[int, list[int]]] = [(count, list(judged))]

    def add(self) -> bool:
        """Count a record; True where `mark` is due."""
        self.count += 1
        return self.count >= self._due

    def mark(self, judged: Sequence[int]) -> None:
        """Take down how often each rule has judged by now."""
        self._marks.append((self.count, list(judged)))
        if len(self._marks) > MOST:
            self._marks = self._marks[::2]
            self._width *= 2
        self._due = self.count + self._width

    def of(self, judged: Sequence[int]) -> list[tuple[float, ...]]:
        """Return, for each rule, the share of records that it judged in each part, from 0 to 1.

        Args:
            judged: how often each rule has judged by now.
        """
        marks = [(count, told or [0] * len(judged)) for count, told in self._marks]
        if self.count > marks[-1][0]:
            marks.append((self.count, list(judged)))
        pairs = list(pairwise(marks))
        return [
            tuple(min(max((b[i] - a[i]) / (n - m), 0.0), 1.0) for (m, a), (n, b) in pairs) for i in range(len(judged))
        ]
