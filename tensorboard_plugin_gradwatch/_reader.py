"""Tensors of the data provider -> matrices over the paths of a run's newest index.

A matrix has a row per step and a column per path (of one kind, in the order of the index).
"""

from __future__ import annotations

import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._catalogue import Series, Source
from ._wire import MISSING, Matrix, Steps

__all__ = [
    "Cache",
    "Point",
    "Table",
    "Unreadable",
    "over",
    "read_headline",
    "read_index",
    "read_json",
    "read_scalars",
    "read_statistic",
]

SIGNED = frozenset({"output_mean"})
"""Statistics below zero too: shown by their size, as a logarithm needs."""


MEASURED_AS_NAN = frozenset({"global_norm", "global_norm_after", "global_norm_max"})
"""Headline fields whose nan is a measurement."""


class Unreadable(Exception):  # noqa: N818 - an answer to show, not a fault of the program
    """A series that can't be read: the message is for the person before the tab."""


class Point(NamedTuple):
    """One tensor of a series."""

    step: int
    value: NDArray[Any]


class Table(NamedTuple):
    """A matrix over steps, its column names, and what had to be left out.

    `MISSING` marks what was not measured.
    """

    steps: Steps
    matrix: Matrix
    names: tuple[str, ...] = ()
    left_out: int = 0


Read = Callable[[Series], Sequence[Point]]


class Cache:
    """Keeps what was decoded as long as its series have not grown, up to a number of bytes."""

    def __init__(self, limit_bytes: int = 256 << 20) -> None:
        self._limit = limit_bytes
        self._held: OrderedDict[tuple[Any, ...], tuple[tuple[Any, ...], Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[Any, ...], stamp: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Return what was made for this key and stamp, making it now where it is new."""
        with self._lock:
            held = self._held.get(key)
            if held is not None and held[0] == stamp:
                self._held.move_to_end(key)
                return held[1]
        made = make()
        with self._lock:
            self._held[key] = (stamp, made, _size(made))
            self._held.move_to_end(key)
            while len(self._held) > 1 and sum(h[2] for h in self._held.values()) > self._limit:
                self._held.popitem(last=False)
        return made


def _size(value: Any) -> int:
    return value.matrix.nbytes + value.steps.nbytes if isinstance(value, Table) else 1 << 16


def read_json(read: Read, series: Series | None) -> list[tuple[int, Any]]:
    """Return step and value of each JSON text in a series of strings; damaged ones are left out."""
    if series is None:
        return []
    found: list[tuple[int, Any]] = []
    for point in read(series):
        for text in np.ravel(point.value):
            value = _parsed(text)
            if value is not None:
                found.append((point.step, value))
    return found


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError):
        return None


def read_index(read: Read, source: Source) -> list[tuple[int, dict[str, Any]]]:
    """Return the indexes of a run with the steps from which they hold, oldest first.

    Raises:
        Unreadable: none can be read.
    """
    series = source.by_kind.get("index")
    found = [(step, index) for step, index in read_json(read, series) if _is_index(index)]
    if not found:
        raise Unreadable(f"The list of paths of {source.id} is damaged, so its rows have no names.")
    return found


def _is_index(index: Any) -> bool:
    if not isinstance(index, dict):
        return False
    lists = [index.get(name) for name in ("paths", "kinds", "numel", "shapes", "depth")]
    return all(isinstance(part, list) for part in lists) and len({len(part) for part in lists if part is not None}) == 1


def over(index: Mapping[str, Any], kind: str) -> list[str]:
    """Return the paths that a statistic over `"parameter"`, `"module"` or `"all"` has a row for."""
    return [p for p, k in zip(index["paths"], index["kinds"], strict=True) if kind in ("all", k)]


def read_statistic(read: Read, source: Source, statistic: str) -> Table:
    """Return a statistic over the newest index, in float32; the largest of each logging window where it is known.

    Raises:
        Unreadable: the run has no such statistic.
    """
    windows = source.statistics.get(statistic)
    if not windows:
        raise Unreadable(f"{source.id} has no statistic {statistic!r}. It has {', '.join(sorted(source.statistics))}.")
    indexes = read_index(read, source)
    begins = [step for step, _ in indexes]
    rows: dict[int, tuple[int, NDArray[Any]]] = {}
    left_out, kind = 0, "parameter"
    for window in ("last", "max"):  # the maximum last: it replaces the newest value where it has the step
        series = windows.get(window)
        if series is None:
            continue
        kind = str(series.content.get("over", "parameter"))
        sizes = [len(over(index, kind)) for _, index in indexes]
        for step, value in read(series):
            at = max(0, bisect_right(begins, step) - 1)
            if value.size == sizes[at] and value.dtype.kind == "f":
                rows[step] = at, value.ravel()
            else:
                left_out += 1
    names = tuple(over(indexes[-1][1], kind))
    steps = sorted(rows)
    matrix = np.full((len(steps), len(names)), MISSING, np.float32)
    for at in {at for at, _ in rows.values()}:
        places = [i for i, step in enumerate(steps) if rows[step][0] == at]
        values = _decode(np.stack([rows[steps[i]][1] for i in places]))
        old = {path: i for i, path in enumerate(over(indexes[at][1], kind))}
        there = [j for j, path in enumerate(names) if path in old]
        matrix[np.ix_(places, there)] = values[:, [old[names[j]] for j in there]]
    if statistic in SIGNED:
        matrix = np.where(matrix == MISSING, matrix, np.abs(matrix))
    return Table(np.asarray(steps, np.float64), matrix, names, left_out)


def _decode(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return float32 with `MISSING` for negative zero. What float32 can't hold stays finite, and not zero."""
    missing = (values == 0) & np.signbit(values)
    if values.dtype != np.float32:
        limits = np.finfo(np.float32)
        with np.errstate(over="ignore", under="ignore"):
            small = values.astype(np.float32)
        small = np.where(np.isfinite(values) & np.isinf(small), np.copysign(limits.max, small), small)
        values = np.where((values != 0) & (small == 0), np.copysign(limits.smallest_subnormal, values), small)
    decoded = np.where(np.isneginf(values), np.float32(np.inf), values)
    decoded[missing] = MISSING
    return decoded


def read_headline(read: Read, source: Source) -> Table:
    """Return the headline numbers, one column each."""
    series = source.by_kind.get("headline")
    fields = [str(f) for f in series.content.get("fields") or ()] if series is not None else []
    points = read(series) if series is not None else ()
    fitting = [p for p in points if p.value.size == len(fields)]
    values = np.array([p.value.ravel() for p in fitting], np.float64).reshape(len(fitting), len(fields))
    for j, name in enumerate(fields):
        if name not in MEASURED_AS_NAN:  # elsewhere nan says: not measured
            values[np.isnan(values[:, j]), j] = MISSING
    steps = np.array([p.step for p in fitting], np.float64)
    return Table(steps, _narrow(values), tuple(fields), len(points) - len(fitting))


def read_scalars(read: Read, source: Source) -> Table:
    """Return every other scalar, one column each."""
    columns: dict[str, dict[int, float]] = {}
    left_out = 0
    for step, scalars in read_json(read, source.by_kind.get("scalars")):
        for name, value in scalars.items() if isinstance(scalars, dict) else ():
            if isinstance(value, (int, float, str)) and _is_number(value):
                columns.setdefault(str(name), {})[step] = float(value)
            else:
                left_out += 1
    steps = sorted({step for column in columns.values() for step in column})
    matrix = np.full((len(steps), len(columns)), MISSING)
    row = {step: i for i, step in enumerate(steps)}
    for j, column in enumerate(columns.values()):
        matrix[[row[s] for s in column], j] = np.maximum(list(column.values()), -3.4e38)  # -inf would say: not measured
    return Table(np.asarray(steps, np.float64), _narrow(matrix), tuple(columns), left_out)


def _narrow(values: NDArray[np.float64]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _is_number(value: float | str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
