"""Spectral norm and stable rank of weights, by a few products with each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError
from ..records import Column, column_of
from ..stats import Statistic, View
from ..torchside import home, moved, wide_dtype

__all__ = ["WeightSpectra"]

Array = NDArray[np.float64]

_NAMES = ("spectral_norm", "stable_rank")
_ROUNDING = 1e-5


class WeightSpectra(Statistic):
    """Largest singular value of each weight, and its stable rank: squared norm over squared largest singular value.

    A spectral norm bounds what a layer can do to its input; one that grows without end goes before logits and losses
    that do (Zhai et al., arXiv 2303.06296). A stable rank that falls towards 1 tells of a weight that has become one of
    a single direction. Weights of more than two dimensions are taken as (first, all others), as convolutions do.

    By Golub and Kahan's bidiagonalization from a fixed random vector, two products with the weight an iteration, in
    float32 at least; the small matrix that is left is taken apart on the host. From below, and within 1 % of the exact
    value after 16 iterations, where the spectrum of a random matrix is as flat as they come. nan for a parameter that
    lies in pieces on several ranks.

    Args:
        every: measured at one optimizer step in this many, and at the powers of two below it.
        iterations: of a weight.

    Raises:
        ConfigError: a number below 1.
    """

    needs = frozenset({"parameters"})
    whole = True
    every = 100
    num_sums = 34

    def __init__(self, every: int = 100, iterations: int = 16) -> None:
        for name, value in (("every", every), ("iterations", iterations)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"WeightSpectra: `{name}` is a whole number of at least 1. Got {value!r}.")
        self.every, self.iterations, self.num_sums = every, iterations, 2 * iterations + 2

    @classmethod
    def columns(cls) -> tuple[Column, ...]:
        return tuple(column for name in _NAMES if (column := column_of(name)) is not None)

    def sums(self, view: View) -> Tensor:
        """Return norm, unit, and in that unit the bidiagonal matrix, shape (n, 2 * iterations + 2)."""
        rows = [self._row(param) for param in view.params]
        device = home(rows)
        return torch.stack([moved(row, device, wide_dtype(device)) for row in rows])

    def _row(self, weight: Tensor) -> Tensor:
        if weight.dim() < 2 or not weight.is_floating_point():
            return torch.full((self.num_sums,), torch.nan, device=weight.device)
        if not weight.numel():
            return torch.zeros(self.num_sums, device=weight.device)
        wide = wide_dtype(weight.device)
        matrix = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
        # In units of the largest entry, without a copy: squares of large and of small weights leave float32.
        unit = matrix.abs().amax().clamp(min=torch.finfo(matrix.dtype).tiny)
        norm = torch.linalg.vector_norm(matrix, dtype=wide)
        found = torch.stack([norm, *(x.to(wide) for x in (unit, *self._bidiagonal(matrix, unit)))])
        return torch.nn.functional.pad(found, (0, self.num_sums - len(found)))

    def _bidiagonal(self, matrix: Tensor, unit: Tensor) -> list[Tensor]:
        """Return diagonal and upper diagonal, one after the other, as far as the smaller side goes."""
        right, left = _start(matrix), torch.zeros_like(matrix[:, 0])
        beside, found = torch.zeros_like(unit), []
        rights: list[Tensor] = [right]
        lefts: list[Tensor] = []
        # Below that there is nothing but rounding: one that was let in would bring values back that are found already.
        least = torch.linalg.vector_norm(matrix @ (right / unit)) * _ROUNDING
        for _ in range(min(self.iterations, *matrix.shape)):
            left, diagonal = _direction(matrix @ (right / unit) - beside * left, lefts, least)
            right, beside = _direction(matrix.mT @ (left / unit) - diagonal * right, rights, least)
            found += [diagonal, beside]
            lefts.append(left)
            rights.append(right)
        return found

    def finish(self, sums: Array, maxima: Array) -> dict[str, Array]:
        norms = np.array([row[1] * _largest(row[2::2], row[3::2]) for row in sums])
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"spectral_norm": norms, "stable_rank": np.square(sums[:, 0] / norms)}


def _direction(vector: Tensor, others: Sequence[Tensor], least: Tensor) -> tuple[Tensor, Tensor]:
    """Return what of a vector is across the others, at length 1, and how long it was; nothing where it is shorter."""
    if others:
        basis = torch.stack(list(others))
        for _ in range(2):
            vector = vector - basis.mT @ (basis @ vector)
    length = torch.linalg.vector_norm(vector)
    # Not `>`: what is not finite stays so.
    length = torch.where(length <= least, 0, length)
    return torch.where(length == 0, 0, vector / length), length


def _start(matrix: Tensor) -> Tensor:
    """Return a direction of length 1, always the same, without a draw from anybody's random numbers."""
    places = torch.arange(1, matrix.shape[1] + 1, dtype=torch.float32, device=matrix.device)
    entries = torch.sin(places.square() * 12.9898).to(matrix.dtype)
    return entries / torch.linalg.vector_norm(entries)


def _largest(diagonal: Sequence[float] | Array, beside: Sequence[float] | Array) -> float:
    """Return the largest singular value of an upper bidiagonal matrix; nan where anything in it is not finite."""
    small: Any = np.diag(diagonal) + np.diag(np.asarray(beside)[:-1], 1)
    return float(np.linalg.norm(small, 2)) if np.isfinite(small).all() else float("nan")
