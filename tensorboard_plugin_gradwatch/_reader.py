"""Tensors of the data provider -> matrices over the paths of a run's newest index.

A matrix has a row per step and a column per path (of one kind, in the order of the index).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._catalogue import Series, Source
from ._shown import Table, Unreadable, over
from ._wire import MISSING, Steps

__all__ = [
    "Point",
    "read_headline",
    "read_index",
    "read_json",
    "read_scalars",
    "read_statistic",
    "standing",
]

SIGNED = frozenset({"output_mean"})
"""Statistics below zero too: shown by their size, as a logarithm needs."""


MEASURED_AS_NAN = frozenset({"global_norm", "global_norm_after", "global_norm_max"})
"""Headline fields whose nan is a measurement, but where the window has no gradient."""


class Point(NamedTuple):
    """One tensor of a series."""

    step: int
    value: NDArray[Any]


Read = Callable[[Series], Sequence[Point]]


def standing(points: Sequence[Point]) -> list[Point]:
    """Return the points, in order of their steps, without those that a resumed run wrote anew."""
    kept: list[Point] = []
    for point in reversed(points):
        if not kept or point.step < kept[-1].step:
            kept.append(point)
    return kept[::-1]


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


def read_statistic(read: Read, source: Source, statistic: str) -> Table:
    """Return a statistic over the newest index, in float32; the largest of each logging window where it is known.

    Such a row stands for the steps since the row before it, a newest value for its own step alone.

    Raises:
        Unreadable: the run has no such statistic.
    """
    windows = source.statistics.get(statistic)
    if not windows:
        raise Unreadable(f"{source.id} has no statistic {statistic!r}. It has {', '.join(sorted(source.statistics))}.")
    indexes = read_index(read, source)
    begins = [step for step, _ in indexes]
    rows: dict[int, tuple[int, NDArray[Any]]] = {}
    largest: set[int] = set()
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
                largest |= {step} if window == "max" else set()
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
    ends = np.asarray(steps, np.float64)
    return Table(_begins(read, source, ends, largest), matrix, names, left_out, ends)


def _begins(read: Read, source: Source, ends: Steps, largest: set[int]) -> Steps:
    """Return the first step that each row stands for.

    Args:
        read: a series.
        source: that all is of.
        ends: the step at which each row was written.
        largest: those at which a maximum was written.
    """
    if not largest:
        return ends
    headline = read_headline(read, source)
    windows = headline.matrix[:, headline.names.index("window")] if "window" in headline.names else np.zeros(0)
    length = dict(zip(headline.steps.tolist(), windows.tolist(), strict=False))
    begins = ends.copy()
    for i, step in enumerate(ends.tolist()):
        if step in largest:
            before = ends[i - 1] if i else step - max(1.0, length.get(step, 1.0))
            begins[i] = before + 1
    return begins


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
    unseen = values[:, fields.index("num_seen")] == 0 if "num_seen" in fields else np.zeros(len(values), np.bool_)
    for j, name in enumerate(fields):
        # Elsewhere nan says: not measured.
        absent = np.isnan(values[:, j]) & (unseen if name in MEASURED_AS_NAN else True)
        values[absent, j] = MISSING
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
