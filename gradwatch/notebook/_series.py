"""What a card draws: loss, norms and layers over steps, in a bounded number of points."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..records import Bools, Floats, Index, StepRecord
from ._strip import MISSING

__all__ = ["MOST_POINTS", "Series"]

MOST_POINTS = 480
"""A point stands for one record at first; where there are more, for two, four, ...: the largest of them."""
MOST_LAYERS = 256


class Series:
    """Points over steps. Nan is the largest of all, so that one step of it is seen; `MISSING` the smallest.

    Attributes:
        layers: parameter paths: the weights (two dimensions or more) that an optimizer holds, in forward order; all of
            its parameters where it has none; of very many some, evenly.
        last_step: the newest; -1 where there is none.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("loss", "global_norm", "global_norm_applied", "limit")

    def __init__(self, records: Iterable[StepRecord] = ()) -> None:
        self.layers: list[str] = []
        self.last_step = -1
        self._index: Index | None = None
        # Where layers stand among `layers`, and in the index.
        self._there = self._places = np.zeros(0, np.int64)
        self._steps: list[int] = []
        self._points: list[Floats] = []
        self._each = self._held = 1
        for record in records:
            self.add(record)

    @classmethod
    def over(cls, steps: NDArray[np.int64], index: Index) -> Series:
        """Return one without numbers over all steps (T,) of a run, for `put` and `put_norms`."""
        made = cls()
        made._look(index)
        while MOST_POINTS * made._each < len(steps):
            made._each *= 2
        made._steps, made.last_step = steps[:: made._each].tolist(), int(steps[-1])
        made._points = [np.full(len(cls.NAMES) + len(made.layers), MISSING) for _ in made._steps]
        return made

    def __len__(self) -> int:
        return len(self._points)

    def add(self, record: StepRecord) -> None:
        """Take one record; steps that were taken before (a training that went back) are forgotten first."""
        while self._steps and self._steps[-1] >= record.step:
            self._steps.pop()
            self._points.pop()
            self._held = self._each
        row, self.last_step = self._row(record), record.step
        if self._points and self._held < self._each:
            self._points[-1] = np.maximum(self._points[-1], row)
            self._held += 1
            return
        if len(self._points) == MOST_POINTS:
            self._halve()
        self._steps.append(record.step)
        self._points.append(row)
        self._held = 1

    def put(self, name: str, steps: NDArray[np.int64], values: Floats) -> None:
        """Take all of one of `NAMES`: steps (T,), values (T,)."""
        place = self.NAMES.index(name)
        for point, largest in self._pooled(steps, np.where(np.isneginf(values), np.inf, values)):
            point[place] = np.maximum(point[place], largest)

    def put_norms(self, steps: NDArray[np.int64], values: Floats, measured: Bools) -> None:
        """Take gradient norms over the index: steps (T,), values and what was measured (T, n)."""
        kept = np.where(measured[:, self._places], values[:, self._places], MISSING)
        there = self._there + len(self.NAMES)
        for point, largest in self._pooled(steps, kept):
            point[there] = np.maximum(point[there], largest)

    @property
    def steps(self) -> Floats:
        """The first step of each point, shape (T,)."""
        return np.asarray(self._steps, np.float64)

    def curve(self, name: str) -> Floats:
        """Return one of `NAMES` over the points, shape (T,)."""
        place = self.NAMES.index(name)
        return np.asarray([point[place] for point in self._points], np.float64)

    @property
    def norms(self) -> Floats:
        """Gradient norms of the layers, shape (T, len(layers))."""
        rows = [point[len(self.NAMES) :] for point in self._points]
        return np.asarray(rows, np.float64).reshape(len(self), len(self.layers))

    def _pooled(self, steps: NDArray[np.int64], values: Floats) -> Iterable[tuple[Floats, Any]]:
        """Yield each point with the largest of the values (T, ...) that fall to it."""
        if not len(steps):
            return
        points = np.maximum(np.searchsorted(self._steps, steps, side="right") - 1, 0)
        first = np.flatnonzero(np.diff(points, prepend=-1))
        for point, largest in zip(points[first].tolist(), np.maximum.reduceat(values, first, axis=0), strict=True):
            yield self._points[point], largest

    def _halve(self) -> None:
        pairs = zip(self._points[::2], self._points[1::2], strict=True)
        self._points = [np.maximum(a, b) for a, b in pairs]
        self._steps = self._steps[::2]
        self._each *= 2

    def _row(self, record: StepRecord) -> Floats:
        if record.index is not self._index:
            self._look(record.index)
        limits = [v for name, v in record.scalars.items() if name == "limit" or name.startswith("limit/")]
        # A loss of minus infinity is one that is not finite, and was measured.
        loss = np.inf if np.isneginf(record.loss) else record.loss
        head = [
            loss if record.has_loss else MISSING,
            record.global_norm if record.has_gradient else MISSING,
            record.scalars.get("global_norm_applied", MISSING),
            min((v for v in limits if np.isfinite(v)), default=MISSING),
        ]
        values = np.full(len(self.layers), MISSING)
        if "grad_norm" in record.columns:
            column = np.where(record.measured("grad_norm"), record.columns["grad_norm"], MISSING)
            values[self._there] = column[self._places]
        return np.concatenate([head, values])

    def _look(self, index: Index) -> None:
        if self._index is None:
            self.layers = _layers(index)
        self._index = index
        found = [(i, index.positions[path]) for i, path in enumerate(self.layers) if path in index.positions]
        self._there = np.asarray([i for i, _ in found], np.int64)
        self._places = np.asarray([place for _, place in found], np.int64)


def _layers(index: Index) -> list[str]:
    held = index.is_parameter & index.in_optimizer
    rows = np.flatnonzero(held & (index.ndim >= 2))
    rows = rows if len(rows) else np.flatnonzero(held)
    rows = rows[np.argsort(index.depth[rows], kind="stable")]
    if len(rows) > MOST_LAYERS:
        rows = rows[np.linspace(0, len(rows) - 1, MOST_LAYERS).astype(np.int64)]
    return [index.paths[i] for i in rows.tolist()]
