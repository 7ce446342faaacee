"""Everything about gradients in as few reads and collectives as there can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..torchside import home, is_host
from ._details import local_details
from ._device import scanned, scans
from ._exponents import local_histograms
from ._native import native_lent
from ._norms import Row, local_norms, norms_apart
from ._packed import counted, counted_apart
from ._shards import Shards, alike, index_on, put_together

__all__ = ["GradientMeasures", "GradientPieces", "measure_gradients", "measure_pieces"]

_WORTH_NATIVE = 1 << 18


@dataclass(frozen=True, eq=False)
class GradientMeasures:
    """Norms, details and histograms of n tensors, on their device.

    Attributes:
        row: L2 norms, as by `tensor_norms`.
        sums: float64, shape (n, 2): zeros and non-finite elements, as by `gradient_details`.
        maxima: float64, shape (n, 1): largest magnitudes.
        histograms: int64, shape (n, 512), as by `exponent_histograms`; None if not asked for.
        absent: bool, shape (n,): tensors that turned out to be on no rank; None where that was known before.
    """

    row: Row
    sums: Tensor
    maxima: Tensor
    histograms: Tensor | None
    absent: Tensor | None = None

    @property
    def norms(self) -> Tensor:
        """What `row` holds: float64, shape (n,)."""
        return self.row.tensor


@torch.no_grad()
def measure_gradients(
    tensors: Sequence[Tensor], *, histograms: bool = False, of: Sequence[Tensor] | None = None
) -> GradientMeasures:
    """Return norms, details and histograms of tensors at once.

    On CUDA from one read of each tensor (two kernel launches in all), on the CPU from one or two. Costs one SUM
    all-reduce of one packed vector and one MAX per mesh dimension that DTensors among them are split over.

    Args:
        tensors, of: as for `tensor_norms`.
        histograms: count exponents too.
    """
    pieces = measure_pieces(tensors, details=True, histograms=histograms, of=of)
    if pieces.shards.groups:
        assert pieces.rows is not None
        assert pieces.maxima is not None
        pieces.shards.sum_(pieces.rows)
        pieces.shards.max_(pieces.maxima)
    return pieces.whole()


@dataclass(frozen=True, eq=False)
class GradientPieces:
    """What was measured of the pieces on this rank, and merges with the other ranks' by addition and maximum.

    Attributes:
        shards: the pieces.
        rows: float64, shape (n, 1), (n, 3) or (n, 515): sum of squares, -inf of what is not there; zeros and
            non-finite elements; histograms, where some tensor is in pieces. None where there are norms alone, and no
            tensor is in pieces.
        maxima: float64, shape (n, 1): largest magnitudes; None if not asked for, and (n, 0) in what `whole` returns.
        row: norms as measured, for tensors that are not in pieces.
        counts: int64, shape (n, 512): histograms, where no tensor is in pieces; of many tensors they are large.
        apart: zeros and largest magnitudes, one by one, where a few kernels give them so: then `rows` and `maxima` are
            None, and what is not finite is in the bins 255 and 511 of `counts`.
    """

    shards: Shards
    rows: Tensor | None
    maxima: Tensor | None
    row: Row
    counts: Tensor | None = None
    apart: tuple[list[Tensor], list[Tensor]] | None = None

    @property
    def norms(self) -> Tensor:
        """What `row` holds: float64, shape (n,)."""
        return self.row.tensor

    def whole(self) -> GradientMeasures:
        """Return the measures, after `rows` and `maxima` were merged over ranks; norms alone where `rows` is None."""
        if self.rows is None:
            nothing = torch.empty(len(self.row), 0, dtype=torch.float64)
            return GradientMeasures(self.row, nothing, nothing, None)
        row, absent = self.row, None
        if self.shards.groups:
            squares = self.rows[:, 0]
            if self.shards.absent is not None:
                absent = torch.isneginf(squares)
                squares = squares.masked_fill(absent, 0.0)
            row = Row(squares.sqrt())
        # Counts are whole numbers below 2**53: exact in float64.
        counts = self.rows[:, 3:].to(torch.int64) if self.rows.shape[1] > 3 else self.counts
        maxima = self.rows[:, 1:2] if self.maxima is None else self.maxima
        return GradientMeasures(row, self.rows[:, 1:3].contiguous(), maxima, counts, absent)

    def mark_absent(self) -> GradientPieces:
        """Say in the rows what is not there; a rank that holds no element of a tensor can't know."""
        if self.shards.absent and self.rows is not None:
            self.rows[:, 0].index_fill_(0, index_on(self.shards.absent, self.rows.device), -torch.inf)
        return self


@torch.no_grad()
def measure_pieces(
    tensors: Sequence[Tensor],
    *,
    details: bool = False,
    histograms: bool = False,
    of: Sequence[Tensor] | None = None,
    apart: bool = False,
    known: Row | None = None,
) -> GradientPieces:
    """Return what `measure_gradients` does of the pieces on this rank, before any collective.

    Args:
        tensors, of: as for `tensor_norms`.
        details: measure zeros, non-finite elements and the largest magnitude too.
        histograms: count exponents too; implies `details`.
        apart: details and histograms may come in `GradientPieces.apart`.
        known: the norms, where somebody has measured them.
    """
    shards = Shards(tensors, of)
    if not (details or histograms):
        row = norms_apart(shards.locals) if known is None else known
        rows = row.tensor.square()[:, None] if shards.groups else None
        return GradientPieces(shards, rows, None, row).mark_absent()
    if apart and not (shards.groups or shards.unstored) and (found := _apart(shards.locals)) is not None:
        row = norms_apart(shards.locals) if known is None else known
        return GradientPieces(shards, None, None, row, found[2], found[:2])
    norms, sums, maxima, counts = _local(shards.locals, histograms)
    shards.add_unstored_(sums)
    if counts is not None:
        shards.add_unstored_(counts)
    parts = [norms.square()[:, None], sums]
    if counts is not None and shards.groups:
        parts, counts = [*parts, counts.to(sums.dtype)], None
    return GradientPieces(shards, torch.cat(parts, dim=1), maxima, Row(norms), counts).mark_absent()


def _apart(pieces: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor] | None:
    # Where there is a kernel that reads once, it does.
    if not pieces or is_host(pieces[0].device) or scans(pieces[0].device):
        return None
    return counted_apart(pieces)


_Measured = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _local(pieces: Sequence[Tensor], histograms: bool) -> _Measured:
    if not pieces:
        sums, maxima = local_details(pieces)
        return local_norms(pieces), sums, maxima, local_histograms(pieces) if histograms else None
    groups, device = alike(pieces), home(pieces)
    if len(groups) == 1:
        return _of_one_kind(pieces, histograms)
    found = [_of_one_kind([pieces[p] for p in positions], histograms) for positions in groups]
    counts = [part[3] for part in found if part[3] is not None]
    return (
        put_together([part[0] for part in found], groups, device),
        put_together([part[1] for part in found], groups, device),
        put_together([part[2] for part in found], groups, device),
        put_together(counts, groups, device) if histograms else None,
    )


def _of_one_kind(pieces: Sequence[Tensor], histograms: bool) -> _Measured:
    found = scanned(pieces, histograms=histograms)
    if found is not None:
        moments, counts = found
        return moments[:, 1].sqrt(), moments[:, 2:4].contiguous(), moments[:, 4:].contiguous(), counts
    if not is_host(pieces[0].device):
        rows, counts = counted(pieces, details=True, histograms=histograms)
        assert rows is not None
        return local_norms(pieces), rows[:, :2].contiguous(), rows[:, 2:].contiguous(), counts
    if pieces[0].dtype is not torch.float64:
        at_hand = native_lent(pieces, worth=_WORTH_NATIVE)
        if at_hand is not None:
            kernels, lent = at_hand
            table, bins = kernels.everything(pieces, lent) if histograms else (kernels.moments(pieces, lent), None)
            moments = torch.from_numpy(table)
            counts = None if bins is None else torch.from_numpy(bins)
            return moments[:, 1].sqrt(), moments[:, 2:4].contiguous(), moments[:, 4:].contiguous(), counts
    sums, maxima = local_details(pieces)
    return local_norms(pieces), sums, maxima, local_histograms(pieces) if histograms else None
