"""What the tab asks of a run, whatever it was read from; and tables of numbers over its steps.

Shapes: T rows in time, N columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from gradwatch.records import Verdict

from ._ridge import HistogramRow
from ._wire import Matrix, Steps, pool

__all__ = ["Levels", "Shown", "Table", "Unreadable", "View", "over"]

FACTOR = 8
"""Rows that one row of the coarse copy stands for."""


class Unreadable(Exception):  # noqa: N818 - an answer to show, not a fault of the program
    """What can't be read: the message is for the person before the tab."""


class Table(NamedTuple):
    """A matrix over steps, its column names, and what had to be left out.

    `MISSING` marks what was not measured.

    Attributes:
        steps: first step that a row stands for.
        matrix: the largest of the steps that a row stands for.
        ends: last step that it stands for; None: each row is one step.
    """

    steps: Steps
    matrix: Matrix
    names: tuple[str, ...] = ()
    left_out: int = 0
    ends: Steps | None = None


class View(NamedTuple):
    """A part of a table, pooled to fit a picture.

    Attributes:
        measured: rows of the table in it, before pooling.
    """

    steps: Steps
    ends: Steps
    matrix: Matrix
    measured: int


class Levels:
    """A table, and a coarse copy for looking at very many steps at once."""

    def __init__(self, table: Table) -> None:
        self.table = table
        ends = table.steps if table.ends is None else table.ends
        self._fine = (table.steps, ends, table.matrix)
        self._coarse = _coarse(*self._fine)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for level in (self._fine, self._coarse) for part in level)

    def view(self, low: float, high: float, columns: int, column: int | None = None) -> View:
        """Return the rows that touch the steps from `low` to `high`, at most `columns` of them where that is not 0.

        Args:
            low, high: steps, both included.
            columns: of the picture.
            column: of the table, for that one alone.
        """
        within = _slice(self._fine, low, high)
        measured = within.stop - within.start
        level = self._fine
        if columns > 0 and measured >= 2 * FACTOR * columns:
            level = self._coarse
            within = _slice(level, low, high)
        steps, ends, matrix = level[0][within], level[1][within], level[2][within]
        matrix = matrix if column is None else matrix[:, column : column + 1]
        return View(*_pooled(steps, ends, matrix, columns), measured)


def _slice(level: tuple[Steps, Steps, Matrix], low: float, high: float) -> slice:
    first = int(np.searchsorted(level[1], low, "left"))
    return slice(first, max(first, int(np.searchsorted(level[0], high, "right"))))


def _coarse(steps: Steps, ends: Steps, matrix_TN: Matrix) -> tuple[Steps, Steps, Matrix]:
    """Return one row for each `FACTOR` of them, and one for what is left."""
    most = matrix_TN[::FACTOR].copy()
    for k in range(1, FACTOR):
        rest = matrix_TN[k::FACTOR]
        np.maximum(most[: len(rest)], rest, out=most[: len(rest)])
    last = np.minimum(np.arange(len(most)) * FACTOR + FACTOR, len(steps)) - 1
    return steps[::FACTOR], ends[last], most


def _pooled(steps: Steps, ends: Steps, matrix_TN: Matrix, columns: int) -> tuple[Steps, Steps, Matrix]:
    pooled, matrix_TN = pool(steps, matrix_TN, columns)
    if len(pooled) < len(steps):
        # A row stands for all up to the next one's first.
        last = np.append(np.searchsorted(steps, pooled[1:]), len(steps)) - 1
        ends = ends[last]
    return pooled, ends, matrix_TN


def over(index: Mapping[str, Any], kind: str) -> list[str]:
    """Return the paths that a statistic over `"parameter"`, `"module"` or `"all"` has a row for."""
    return [p for p, k in zip(index["paths"], index["kinds"], strict=True) if kind in ("all", k)]


class Shown(Protocol):
    """One run. What can't be read raises `Unreadable`.

    Attributes:
        id: as the tab names it.
        message: why nothing of it can be shown; "" where it can.
    """

    id: str
    message: str

    @property
    def last_time(self) -> float:
        """When something was written last, in seconds since the epoch."""
        ...

    def stamp(self, *parts: str) -> tuple[Any, ...]:
        """Return what changes when these parts of it do: `"matrix"` with a statistic's name, `"headline"`, ..."""
        ...

    def about(self) -> dict[str, Any]:
        """Return `index`, `statistics`, `meta`, `has_histograms`, `stamp` and `notes`, as plain values."""
        ...

    def statistic(self, name: str) -> Table:
        """Return a statistic over the newest index."""
        ...

    def headline(self) -> Table:
        """Return the global norm, the limit and the other headline numbers."""
        ...

    def scalars(self) -> Table:
        """Return every other scalar."""
        ...

    def incidents(self) -> tuple[Sequence[Mapping[str, Any]], Verdict]:
        """Return incidents as they stand now, each behind what it follows from, and the verdict."""
        ...

    def histograms(self, path: str) -> Sequence[HistogramRow]:
        """Return the histograms of one parameter's gradient, in order of their steps."""
        ...
