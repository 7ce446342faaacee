"""Columns of a record under construction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..records import Bools, Floats

__all__ = ["Columns", "as_float32"]


@dataclass
class Columns:
    """Columns under construction: full length, with masks."""

    size: int
    values: dict[str, Floats] = field(default_factory=dict)
    masks: dict[str, Bools] = field(default_factory=dict)

    def put(self, name: str, positions: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Set a column at some positions; the others count as not measured."""
        column = self.values.setdefault(name, np.full(self.size, np.nan))
        mask = self.masks.setdefault(name, np.zeros(self.size, np.bool_))
        column[positions] = as_float32(values)
        mask[positions] = True

    def put_modules(
        self, positions: NDArray[np.int64], found: Mapping[str, Floats], masks: Mapping[str, Bools]
    ) -> None:
        """Set the modules' columns; one without any measurement stays absent."""
        for name, values in found.items():
            chosen = masks.get(name)
            if chosen is None:
                self.put(name, positions, values)
            elif chosen.any():
                self.put(name, positions[chosen], values[chosen])

    def put_details(self, positions: NDArray[np.int64], host: Mapping[str, Floats], counts: NDArray[np.int64]) -> None:
        """Set absmax, zero share and non-finite count from `gradient_details`.

        The share is one of all that histograms have counted: of a complex number that is two.
        """
        sums, maxima = host["details_sums"], host["details_maxima"]
        with np.errstate(divide="ignore", invalid="ignore"):
            self.put("zero_fraction", positions, sums[:, 0] / counts.sum(axis=1))
        self.put("nonfinite_count", positions, sums[:, 1])
        self.put("grad_absmax", positions, maxima[:, 0])

    def put_underflow(self, positions: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Set the share of non-zero values below 2**-14, where a float16 becomes denormal."""
        magnitude = counts[:, :256] + counts[:, 256:]
        self.put("underflow_fraction", positions, magnitude[:, 1:113].sum(axis=1) / np.maximum(counts.sum(axis=1), 1))


def as_float32(values: NDArray[Any]) -> Floats:
    """Return float64 values that float32 can hold, so that files keep them exactly in half the space.

    Values outside float32's normal range keep their float64 digits.
    """
    values = np.asarray(values, np.float64)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        short = values.astype(np.float32).astype(np.float64)
        magnitude = np.abs(values)
    inside = (magnitude < 3.4e38) & (magnitude > 1.2e-38) | (values == 0) | ~np.isfinite(values)
    return np.where(inside, short, values)
