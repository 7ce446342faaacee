"""What entries would be lost in a format, read from their exponents alone: such counts are on record, and merge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ._formats import Format

__all__ = ["lost", "scale_exponents"]

_FIRST = 1 - 127
"""Exponent of the magnitudes in bin 1 of a histogram."""


def lost(counts: NDArray[np.generic], to: Format, exponents: NDArray[np.float64] | int = 0) -> NDArray[np.float64]:
    """Return the share of entries that become 0 and of those that become infinite in a format, times a power of two.

    A magnitude below half of the smallest one becomes 0: that bound is a power of two, so exponents tell it exactly
    (but for an entry that lies on the bound itself, which becomes 0 and counts as kept). Infinite counts what lies
    beyond the binade of the largest magnitude.

    Args:
        counts: of magnitudes by exponent, as `Histogram.magnitude_counts`, shape (n, 256).
        to: the format.
        exponents: of the power of two that each row is multiplied by first, shape (n,) or one for all.

    Returns:
        Shares of the finite entries above 2**-126, shape (n, 2); nan where there are none.
    """
    normal = np.asarray(counts, np.float64)[:, 1:255]
    shifted = _FIRST + np.arange(254) + np.asarray(exponents, np.float64).reshape(-1, 1)
    small = shifted < to.smallest_exponent - to.mantissa_bits - 1
    large = shifted > to.largest_exponent
    parts = [(normal * chosen).sum(axis=1) for chosen in (small, large)]
    total = normal.sum(axis=1)
    return np.stack(parts, axis=1) / np.where(total > 0, total, np.nan)[:, None]


def scale_exponents(largest: Sequence[float] | NDArray[np.float64], to: Format) -> NDArray[np.float64]:
    """Return the exponent of the largest power of two that keeps each tensor's largest entry finite, shape (n,).

    Args:
        largest: magnitudes, shape (n,); 0 and what is not finite give 0.
        to: the format that they are to fit in.
    """
    largest = np.asarray(largest, np.float64)
    known = np.isfinite(largest) & (largest > 0)
    share, exponents = np.frexp(np.where(known, largest, 1.0))
    most, top = np.frexp(to.largest)
    return np.where(known, top - exponents - (share > most), 0.0).astype(np.float64)
