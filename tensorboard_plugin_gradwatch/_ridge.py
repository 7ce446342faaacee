"""Histograms of one path over time, on one grid of binary exponents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._wire import Matrix, Steps

__all__ = ["LOG10_2", "RIDGES", "HistogramRow", "exponent_row", "magnitudes", "ridge"]

LOG10_2 = float(np.log10(2.0))
RIDGES = 60

HistogramRow: TypeAlias = "tuple[int, float, float, int, NDArray[Any]]"
"""Step, zeros, non-finite, first exponent and counts by exponent of one histogram."""


def exponent_row(left: float, width: float, counts: NDArray[Any]) -> tuple[int, NDArray[np.float64]]:
    """Return first exponent and counts by exponent of one packed histogram (edges in log10).

    A bucket covers whole exponents; its count is spread evenly over them.
    """
    if not width > 0:
        return 0, np.zeros(0)
    merged = max(1, round(width / LOG10_2))
    return round(left / LOG10_2), np.repeat(np.asarray(counts, np.float64) / merged, merged)


def magnitudes(counts: NDArray[np.int64]) -> tuple[float, float, int, NDArray[np.float64]]:
    """Return zeros, non-finite, first exponent and counts by exponent of 512 signed bins."""
    both = counts[:256] + counts[256:]
    exponent, spread = exponent_row(-126 * LOG10_2, LOG10_2, both[1:255])
    return float(both[0]), float(both[255]), exponent, spread


def ridge(rows: Iterable[HistogramRow], most: int = RIDGES) -> tuple[Steps, Matrix, dict[str, Any]]:
    """Return steps, a matrix (zeros, non-finite, then counts by exponent) and the header that explains it.

    Args:
        rows: step, zeros, non-finite, first exponent and counts by exponent of each histogram, in order of steps.
        most: rows of the result at most; neighbours in time are summed.
    """
    kept = list(rows)
    filled = [(low + int(np.flatnonzero(c)[0]), low + int(np.flatnonzero(c)[-1]) + 1) for *_, low, c in kept if c.any()]
    low, high = (min(a for a, _ in filled), max(b for _, b in filled)) if filled else (0, 0)
    matrix = np.zeros((len(kept), 2 + high - low), np.float64)
    for i, (_, zeros, nonfinite, first, counts) in enumerate(kept):
        matrix[i, :2] = zeros, nonfinite
        used = np.flatnonzero(counts)
        matrix[i, 2 + first - low + used] = counts[used]
    steps = np.asarray([row[0] for row in kept], np.float64)
    if len(kept) > most:
        first_of = np.linspace(0, len(kept), most, endpoint=False).astype(np.int64)
        matrix, steps = np.add.reduceat(matrix, first_of, axis=0), steps[first_of]
    return steps, matrix.astype(np.float32), {"left": low * LOG10_2, "width": LOG10_2}
