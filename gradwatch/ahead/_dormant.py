"""Units that have next to no part in what their layer says."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError
from ..records import Column, column_of
from ..stats import Statistic, View
from ._units import rows_of_units

__all__ = ["DormantUnits"]

Array = NDArray[np.float64]


class DormantUnits(Statistic):
    """Share of a module's units that are dormant: their mean magnitude is at most 0.025 of that of all its units.

    A unit that a network no longer uses gets no gradient to speak of and does not come back; as their number grows, so
    does what the network can't learn any more (Sokar et al., "The Dormant Neuron Phenomenon in Deep Reinforcement
    Learning", ICML 2023, arXiv 2302.12902, definition 3.1). Over a step's whole batch, all its calls, micro-batches and
    ranks. Of at most 256 units of a module, spread over all.

    Args:
        every: measured at one optimizer step in this many, and at the powers of two below it.
        below: share of the mean magnitude, at and below which a unit is dormant.

    Raises:
        ConfigError: `every` below 1, `below` not between 0 and 1.
    """

    needs = frozenset({"outputs"})
    every = 100
    num_sums = 256
    num_maxima = 1

    def __init__(self, every: int = 100, below: float = 0.025) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"DormantUnits: `every` is a whole number of at least 1. Got {every!r}.")
        if not 0 <= below < 1:
            raise ConfigError(f"DormantUnits: `below` is a share of at least 0 and below 1. Got {below!r}.")
        self.every, self.below = every, below

    @classmethod
    def columns(cls) -> tuple[Column, ...]:
        column = column_of("dormant_fraction")
        return () if column is None else (column,)

    def sums(self, view: View) -> Tensor | None:
        """Return the sum of magnitudes of each unit, shape (1, 256); None where the output has no units."""
        rows = rows_of_units(view.outputs, self.num_sums)
        if rows is None:
            return None
        return torch.nn.functional.pad(rows.abs().sum(0), (0, self.num_sums - rows.shape[1]))[None]

    def maxima(self, view: View) -> Tensor | None:
        """Return how many units there are, shape (1, 1)."""
        rows = rows_of_units(view.outputs, self.num_sums)
        return None if rows is None else rows.new_full((1, 1), float(rows.shape[1]))

    def finish(self, sums: Array, maxima: Array) -> dict[str, Array]:
        known = np.arange(sums.shape[1]) < maxima
        return {"dormant_fraction": np.array([self._share(row[at]) for row, at in zip(sums, known, strict=True)])}

    def _share(self, magnitudes: Array) -> float:
        mean = magnitudes.mean() if len(magnitudes) else float("nan")
        return float(np.mean(magnitudes <= self.below * mean)) if np.isfinite(mean) else float("nan")
