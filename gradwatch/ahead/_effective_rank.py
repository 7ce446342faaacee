"""In how many directions a module's outputs differ."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError
from ..records import Column, column_of
from ..stats import Statistic, View
from ._units import rows_of_units

__all__ = ["EffectiveRank"]

Array = NDArray[np.float64]

_UNITS, _SAMPLES = 64, 4096


class EffectiveRank(Statistic):
    """Effective rank of a module's outputs over a batch: e to the entropy of their singular values, as shares.

    From 1, where all samples give multiples of one vector, to the number of units. As it falls over a long training the
    network can tell fewer and fewer things apart: collapse of features, loss of plasticity (Kumar et al., "Implicit
    Under-Parameterization", ICLR 2021, arXiv 2010.14498). Roy and Vetterli's measure (EUSIPCO 2007), which has no
    threshold. Of at most 64 units of a module and 4,096 samples of a call, spread over all: no more than 64.

    Args:
        every: measured at one optimizer step in this many, and at the powers of two below it.

    Raises:
        ConfigError: `every` below 1.
    """

    needs = frozenset({"outputs"})
    every = 100
    num_sums = _UNITS * (_UNITS + 1) // 2

    def __init__(self, every: int = 100) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"EffectiveRank: `every` is a whole number of at least 1. Got {every!r}.")
        self.every = every

    @classmethod
    def columns(cls) -> tuple[Column, ...]:
        column = column_of("effective_rank")
        return () if column is None else (column,)

    def sums(self, view: View) -> Tensor | None:
        """Return the units' products with each other, the upper triangle, shape (1, 2080); None without units."""
        rows = rows_of_units(view.outputs, _UNITS, samples=_SAMPLES)
        if rows is None:
            return None
        gram = torch.nn.functional.pad(rows.mT @ rows, (0, _UNITS - rows.shape[1]) * 2)
        above = torch.triu_indices(_UNITS, _UNITS, device=gram.device)
        return gram[above[0], above[1]][None]

    def finish(self, sums: Array, maxima: Array) -> Array:
        return np.array([_rank(row) for row in sums])


def _rank(triangle: Array) -> float:
    gram = np.zeros((_UNITS, _UNITS))
    gram[np.triu_indices(_UNITS)] = triangle
    if not np.isfinite(gram).all():
        return np.nan
    # Of the Gram matrix the root of the eigenvalue, and of what rounding leaves nothing.
    values = np.linalg.eigvalsh(gram, UPLO="U")
    values = np.sqrt(np.where(values > values.max() * _UNITS * np.finfo(np.float64).eps, values, 0))
    if not values.any():
        return np.nan
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))
