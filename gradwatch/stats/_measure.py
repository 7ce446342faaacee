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

__all__ = ["GradientMeasures", "measure_gradients"]

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
    shards = Shards(tensors)
    norms, sums, maxima, counts = _local(shards.locals, histograms)
    if not shards.groups:
        return GradientMeasures(norms, sums, maxima, counts)
    parts = [norms.square_()[:, None], sums] + ([] if counts is None else [counts.to(sums.dtype)])
    packed = shards.sum_(torch.cat(parts, dim=1))
    maxima = shards.max_(maxima)
    # Counts are whole numbers below 2**53: exact in float64.
    whole = None if counts is None else packed[:, 3:].to(torch.int64)
    return GradientMeasures(packed[:, 0].sqrt(), packed[:, 1:3].contiguous(), maxima, whole)


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
