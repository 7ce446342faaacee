"""Histograms by binary exponent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ._index import Floats

__all__ = ["NUM_BINS", "Histogram"]

NUM_BINS = 512
"""Bins of an exponent histogram: 256 exponents, then 256 more for the negative values."""


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of values by their binary exponent: the same bins for every layer, step and rank, so that sums merge.

    Bin `k` of the first 256 counts positive values of magnitude in `[2**(k-127), 2**(k-126))`; bin 0 zeros and
    denormals, bin 255 inf and nan. The second 256 bins count negative values in the same way.

    Args:
        counts: int64, shape (512,).
    """

    counts: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.counts.shape != (NUM_BINS,):
            raise ValueError(f"a Histogram has {NUM_BINS} counts. Got shape {self.counts.shape}.")

    @cached_property
    def magnitude_counts(self) -> NDArray[np.int64]:
        """Counts by exponent without regard to sign, shape (256,)."""
        return self.counts[:256] + self.counts[256:]

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def zeros(self) -> int:
        """Zeros and float32 denormals."""
        return int(self.magnitude_counts[0])

    @property
    def nonfinite(self) -> int:
        return int(self.magnitude_counts[255])

    def log10_buckets(self, max_buckets: int = 40) -> tuple[Floats, NDArray[np.int64]]:
        """Return edges (n+1,) in log10 of the magnitude and counts (n,), finite non-zero values alone.

        Neighbouring exponents are merged until at most `max_buckets` remain; the outer edges are those of the
        outermost filled bins. Both arrays are empty where every value is zero or non-finite.
        """
        finite = self.magnitude_counts[1:255]
        filled = np.flatnonzero(finite)
        if not len(filled):
            return np.zeros(0), np.zeros(0, np.int64)
        low, high = int(filled[0]), int(filled[-1]) + 1
        width = -(-(high - low) // max_buckets)
        high = low + width * -(-(high - low) // width)
        padded = np.zeros(high - low, np.int64)
        part = finite[low : min(high, len(finite))]
        padded[: len(part)] = part
        counts = padded.reshape(-1, width).sum(axis=1)
        edges = (np.arange(low, high + 1, width) + 1 - 127) * np.log10(2.0)
        return edges, counts

    def merge(self, other: Histogram) -> Histogram:
        return Histogram(self.counts + other.counts)
