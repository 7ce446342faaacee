"""Everything about gradients in as few reads and collectives as there can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._details import local_details
from ._device import scanned
from ._exponents import NUM_BINS, local_histograms
from ._native import native
from ._norms import local_norms
from ._shards import Shards, by_dtype, index_on

__all__ = ["GradientMeasures", "GradientPieces", "measure_gradients", "measure_pieces"]

_WORTH_NATIVE = 1 << 18


@dataclass(frozen=True, eq=False)
class GradientMeasures:
    """Norms, details and histograms of n tensors, on their device.

    Attributes:
        norms: float64, shape (n,): L2 norms, as by `tensor_norms`.
        sums: float64, shape (n, 2): zeros and non-finite elements, as by `gradient_details`.
        maxima: float64, shape (n, 1): largest magnitudes.
        histograms: int64, shape (n, 512), as by `exponent_histograms`; None if not asked for.
    """

    norms: Tensor
    sums: Tensor
    maxima: Tensor
    histograms: Tensor | None


@torch.no_grad()
def measure_gradients(tensors: Sequence[Tensor], *, histograms: bool = False) -> GradientMeasures:
    """Return norms, details and histograms of tensors at once.

    On CUDA from one read of each tensor (two kernel launches in all), on the CPU from one or two. Costs one SUM
    all-reduce of one packed vector and one MAX per mesh dimension that DTensors among them are split over.

    Args:
        tensors: as for `tensor_norms`.
        histograms: count exponents too.
    """
    pieces = measure_pieces(tensors, details=True, histograms=histograms)
    if pieces.shards.groups:
        pieces.shards.sum_(pieces.rows)
        assert pieces.maxima is not None
        pieces.shards.max_(pieces.maxima)
    return pieces.whole()


@dataclass(frozen=True, eq=False)
class GradientPieces:
    """What was measured of the pieces on this rank, and merges with the other ranks' by addition and maximum.

    Attributes:
        shards: the pieces.
        rows: float64, shape (n, 1), (n, 3) or (n, 515): sum of squares; zeros and non-finite elements; histograms.
        maxima: float64, shape (n, 1): largest magnitudes; None if not asked for.
        norms: float64, shape (n,): as measured, for tensors that are not in pieces.
    """

    shards: Shards
    rows: Tensor
    maxima: Tensor | None
    norms: Tensor

    def whole(self) -> GradientMeasures:
        """Return the measures, after `rows` and `maxima` were merged over ranks."""
        norms = self.rows[:, 0].sqrt() if self.shards.groups else self.norms
        # Counts are whole numbers below 2**53: exact in float64.
        counts = self.rows[:, 3:].to(torch.int64) if self.rows.shape[1] > 3 else None
        maxima = self.rows.new_zeros(len(norms), 1) if self.maxima is None else self.maxima
        return GradientMeasures(norms, self.rows[:, 1:3].contiguous(), maxima, counts)


@torch.no_grad()
def measure_pieces(tensors: Sequence[Tensor], *, details: bool = False, histograms: bool = False) -> GradientPieces:
    """Return what `measure_gradients` does of the pieces on this rank, before any collective.

    Args:
        tensors: as for `tensor_norms`.
        details: measure zeros, non-finite elements and the largest magnitude too.
        histograms: count exponents too; implies `details`.
    """
    shards = Shards(tensors)
    if not (details or histograms):
        norms = local_norms(shards.locals)
        return GradientPieces(shards, norms.square()[:, None], None, norms)
    norms, sums, maxima, counts = _local(shards.locals, histograms)
    parts = [norms.square()[:, None], sums] + ([] if counts is None else [counts.to(sums.dtype)])
    return GradientPieces(shards, torch.cat(parts, dim=1), maxima, norms)


def _local(pieces: Sequence[Tensor], histograms: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    if not pieces:
        sums, maxima = local_details(pieces)
        return local_norms(pieces), sums, maxima, local_histograms(pieces) if histograms else None
    groups = by_dtype(pieces)
    if len(groups) == 1:
        return _of_one_dtype(pieces, histograms)
    device = pieces[0].device
    table = torch.zeros(len(pieces), 4, dtype=torch.float64, device=device)
    counts = torch.zeros(len(pieces), NUM_BINS, dtype=torch.int64, device=device) if histograms else None
    for positions in groups:
        index = index_on(positions, device)
        norms, sums, maxima, part = _of_one_dtype([pieces[p] for p in positions], histograms)
        table.index_copy_(0, index, torch.cat([norms[:, None], sums, maxima], dim=1))
        if counts is not None and part is not None:
            counts.index_copy_(0, index, part)
    return table[:, 0].clone(), table[:, 1:3].contiguous(), table[:, 3:].contiguous(), counts


def _of_one_dtype(pieces: Sequence[Tensor], histograms: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    found = scanned(pieces, histograms=histograms)
    if found is not None:
        moments, counts = found
        return moments[:, 1].sqrt(), moments[:, 2:4].contiguous(), moments[:, 4:].contiguous(), counts
    if pieces[0].device.type == "cpu" and pieces[0].dtype is not torch.float64:
        kernels = native(pieces, worth=_WORTH_NATIVE)
        if kernels is not None:
            table, counted = kernels.everything(pieces) if histograms else (kernels.moments(pieces), None)
            moments = torch.from_numpy(table)
            counts = None if counted is None else torch.from_numpy(counted)
            return moments[:, 1].sqrt(), moments[:, 2:4].contiguous(), moments[:, 4:].contiguous(), counts
    sums, maxima = local_details(pieces)
    return local_norms(pieces), sums, maxima, local_histograms(pieces) if histograms else None
