"""Functions of the past, over all paths at once. A memory is a tuple of (step, values) rows, oldest first."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...errors import ConfigError
from ...records import Bools, Floats
from ._nodes import Call

__all__ = ["Memory", "past", "remember"]

MAX_ELEMENTS = 2**24
"""Numbers that one function may remember over all paths: 128 MiB."""

Memory = dict[str, Any]
"""`steps`: of the rows; `rows`: arrays (n,), or floats; `mean`: of an ema, with `count`."""


def remember(call: Call, memory: Memory, step: int, values: Floats | float, known: Bools | bool) -> Memory:
    """Return the memory with the present in it. Non-finite values and paths that were not measured are nan there."""
    usable = np.isfinite(values) & known
    if not np.any(usable):
        return memory
    row: Any = np.where(usable, values, np.nan) if isinstance(usable, np.ndarray) else float(values)
    if call.name == "ema":
        mean, count = memory.get("mean"), memory.get("count", 0)
        if mean is None:
            return {"mean": row, "count": count + 1}
        moved = mean + (row - mean) / call.steps
        if isinstance(row, np.ndarray):
            moved = np.where(np.isnan(mean), row, np.where(np.isnan(row), mean, moved))
        return {"mean": moved, "count": count + 1}
    if isinstance(row, np.ndarray) and call.steps * len(row) > MAX_ELEMENTS:
        raise ConfigError(f"{call.name} over {call.steps} measurements of {len(row)} paths needs too much memory.")
    keep = call.steps - 1
    rows, steps = memory.get("rows", ()), memory.get("steps", ())
    return {"rows": (*(rows[-keep:] if keep else ()), row), "steps": (*(steps[-keep:] if keep else ()), step)}


def past(call: Call, memory: Memory, step: int, now: Floats | float) -> tuple[Any, Any]:
    """Return the function's value and where it is known, from the past alone (a rate looks at the present too)."""
    least = min(call.steps, max(5, call.steps // 10))
    if call.name == "ema":
        if memory.get("count", 0) < least:
            return math.nan, False
        mean = memory["mean"]
        return mean, np.isfinite(mean) if isinstance(mean, np.ndarray) else True
    rows, steps = memory.get("rows", ()), memory.get("steps", ())
    if call.name in ("lag", "rate"):
        if len(rows) < call.steps:
            return math.nan, False
        value = rows[0] if call.name == "lag" else (now - rows[0]) / max(step - steps[0], 1)
        return value, np.isfinite(value) if isinstance(value, np.ndarray) else True
    if len(rows) < least:
        return math.nan, False
    table = np.stack(rows) if isinstance(rows[0], np.ndarray) else np.asarray(rows, np.float64)[:, None]
    values, counts = _reduce(call, table)
    known = counts >= least
    return (values, known) if isinstance(rows[0], np.ndarray) else (float(values[0]), bool(known[0]))


def _reduce(call: Call, table: Floats) -> tuple[Floats, Any]:
    """Reduce (t, n) over time without regard to nan; return values (n,) and how many there were."""
    holes = np.isnan(table)
    counts = len(table) - holes.sum(axis=0)
    if call.name in ("median", "quantile"):
        share = 0.5 if call.name == "median" else call.share
        if not holes.any():
            return np.quantile(table, share, axis=0), counts
        ordered = np.sort(table, axis=0)
        place = share * np.maximum(counts - 1, 0)
        low = np.floor(place).astype(np.int64)
        high = np.minimum(low + 1, np.maximum(counts - 1, 0))
        columns = np.arange(table.shape[1])
        a, b = ordered[low, columns], ordered[high, columns]
        return a + (b - a) * (place - low), counts
    if call.name == "max":
        return np.fmax.reduce(table, axis=0), counts
    if call.name == "min":
        return np.fmin.reduce(table, axis=0), counts
    filled = np.where(holes, 0.0, table)
    mean = filled.sum(axis=0) / np.maximum(counts, 1)
    if call.name == "mean":
        return mean, counts
    deviations = np.where(holes, 0.0, table - mean)
    return np.sqrt(np.square(deviations).sum(axis=0) / np.maximum(counts, 1)), counts
