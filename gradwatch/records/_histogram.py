"""Histograms by binary exponent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ._index import Floats

__all__ = ["NUM_BINS", "Buckets", "Histogram", "HistogramTable"]

NUM_BINS = 512
"""Bins of an exponent histogram: 256 exponents, then 256 more for the negative values."""
AT_ONCE = 1024
"""Histograms that are written out side by side: of many tensors they take far more than what is in them."""


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

    @property
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
        return Buckets.of([self], max_buckets)[0]

    def merge(self, other: Histogram) -> Histogram:
        return Histogram(self.counts + other.counts)


class HistogramTable(Mapping[str, Histogram]):
    """Histograms of many paths, no larger than what is in them: of most tensors most bins are empty.

    Args:
        paths: one for each row.
        counts: int64, shape (n, 512).

    Attributes:
        paths: in the order of the rows.
        starts: int64, shape (n + 1,): where each row's filled bins begin among `bins` and `counts`.
        bins: uint16, the filled bins, row after row.
        counts: of those, unsigned, as narrow as they may be.
    """

    def __init__(self, paths: Sequence[str], counts: NDArray[np.int64]) -> None:
        self.paths = tuple(paths)
        filled = counts != 0
        shape = (len(self.paths), NUM_BINS)
        if filled.shape != shape:
            raise ValueError(f"{len(self.paths)} paths need counts {shape}. Got {counts.shape}.")
        self.starts = np.concatenate([np.zeros(1, np.int64), np.count_nonzero(filled, axis=1).cumsum()])
        self.bins = (np.flatnonzero(filled) % NUM_BINS).astype(np.uint16)
        values = counts[filled]
        self.counts = values.astype(np.min_scalar_type(int(values.max(initial=0))))

    @classmethod
    def of(cls, histograms: Mapping[str, Histogram]) -> HistogramTable:
        """Return a table of what any mapping holds."""
        if isinstance(histograms, cls):
            return histograms
        rows = [h.counts for h in histograms.values()]
        return cls(list(histograms), np.array(rows, np.int64).reshape(-1, NUM_BINS))

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {path: i for i, path in enumerate(self.paths)}

    def __getitem__(self, path: str) -> Histogram:
        row = self._positions[path]
        counts = np.zeros(NUM_BINS, np.int64)
        part = slice(self.starts[row], self.starts[row + 1])
        counts[self.bins[part]] = self.counts[part]
        return Histogram(counts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def nbytes(self) -> int:
        """What it takes in memory, but for the paths themselves."""
        return self.starts.nbytes + self.bins.nbytes + self.counts.nbytes + 8 * len(self.paths)


@dataclass(frozen=True, eq=False)
class Buckets:
    """Log10 buckets of n histograms at once; each as by `Histogram.log10_buckets`.

    Attributes:
        edges: float64, shape (n, max_buckets + 1); of equal distance in each row.
        counts: int64, shape (n, max_buckets); zeros behind the last bucket of a row.
        lengths: int64, shape (n,): buckets in each row; 0 where every value is zero or non-finite.
        rest: int64, shape (n, 2): zeros, and non-finite values.
    """

    edges: Floats
    counts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    rest: NDArray[np.int64]

    @classmethod
    def of(cls, histograms: Iterable[Histogram], max_buckets: int) -> Buckets:
        waiting = iter(histograms)
        parts = [cls._of_some([], max_buckets)]
        while some := list(islice(waiting, AT_ONCE)):
            parts.append(cls._of_some(some, max_buckets))
        return cls(
            *(np.concatenate([getattr(p, name) for p in parts]) for name in ("edges", "counts", "lengths", "rest"))
        )

    @classmethod
    def _of_some(cls, histograms: Sequence[Histogram], max_buckets: int) -> Buckets:
        both = np.array([h.magnitude_counts for h in histograms], np.int64).reshape(-1, 256)
        finite = both[:, 1:255]
        filled = finite > 0
        low = filled.argmax(axis=1)
        high = np.where(filled.any(axis=1), 254 - filled[:, ::-1].argmax(axis=1), low)
        width = np.maximum(1, -(-(high - low) // max_buckets))
        places = low[:, None] + width[:, None] * np.arange(max_buckets + 1)
        below = np.concatenate([np.zeros((len(both), 1), np.int64), finite.cumsum(axis=1)], axis=1)
        counts = np.diff(np.take_along_axis(below, np.minimum(places, 254), axis=1), axis=1)
        edges = (places + 1 - 127) * np.log10(2.0)
        return cls(edges, counts, -(-(high - low) // width), both[:, [0, 255]])

    def __getitem__(self, row: int) -> tuple[Floats, NDArray[np.int64]]:
        """Return one histogram's edges (k+1,) and counts (k,)."""
        length = int(self.lengths[row])
        if not length:
            return np.zeros(0), np.zeros(0, np.int64)
        return self.edges[row, : length + 1], self.counts[row, :length]
