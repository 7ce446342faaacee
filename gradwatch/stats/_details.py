"""What a norm does not tell: the largest element, how many are exactly zero, how many are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..torchside import home, is_host
from ._counting import num_nonzero
from ._device import scanned
from ._native import native
from ._packed import counted
from ._shards import Shards, alike, put_together

__all__ = ["GradientDetails", "gradient_details", "local_details"]

_WORTH_NATIVE = 1 << 16


@dataclass(frozen=True, eq=False)
class GradientDetails:
    """Details of n tensors, on their device.

    Attributes:
        sums: float64, shape (n, 2): how many elements are exactly zero, and how many inf or nan. Elements that a
            sparse tensor does not store are zeros as others are.
        maxima: float64, shape (n, 1): the largest magnitude, inf included, nan left out; 0 for an empty tensor.
    """

    sums: Tensor
    maxima: Tensor
    _shards: Shards | None = None

    def reduce_(self) -> GradientDetails:
        """Put the pieces of sharded tensors together, in place, and return self.

        One SUM and one MAX all-reduce per mesh dimension that tensors are split over; none for plain tensors, nor
        when called again.
        """
        if self._shards is not None:
            self._shards.sum_(self.sums)
            self._shards.max_(self.maxima)
            object.__setattr__(self, "_shards", None)
        return self


@torch.no_grad()
def gradient_details(tensors: Sequence[Tensor], *, reduce: bool = True) -> GradientDetails:
    """Return zeros, non-finite counts and the largest magnitude of each tensor; reads nothing back from a device.

    Args:
        tensors: as for `tensor_norms`.
        reduce: put the pieces of sharded tensors together now; else `GradientDetails.reduce_` does it later.
    """
    shards = Shards(tensors)
    sums, maxima = local_details(shards.locals)
    shards.add_unstored_(sums)
    details = GradientDetails(sums, maxima, shards if shards.groups else None)
    return details.reduce_() if reduce else details


def local_details(pieces: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return sums (n, 2) and maxima (n, 1) of contiguous local pieces."""
    if not pieces:
        return torch.zeros(0, 2, dtype=torch.float64), torch.zeros(0, 1, dtype=torch.float64)
    groups = alike(pieces)
    parts = [_of_one_kind([pieces[p] for p in positions]) for positions in groups]
    table = put_together(parts, groups, home(pieces))
    return table[:, :2].contiguous(), table[:, 2:].contiguous()


def _of_one_kind(pieces: Sequence[Tensor]) -> Tensor:
    """Return zeros, non-finite counts and absmax of pieces of one device and dtype, shape (n, 3)."""
    if not is_host(pieces[0].device):
        found = scanned(pieces, histograms=False)
        rows = counted(pieces, details=True)[0] if found is None else found[0][:, 2:]
        assert rows is not None
        return rows
    kernels = native(pieces, worth=_WORTH_NATIVE)
    if kernels is not None:
        return torch.from_numpy(kernels.moments(pieces)[:, 2:])
    return torch.tensor([_host_details(piece) for piece in pieces], dtype=torch.float64)


def _host_details(piece: Tensor) -> tuple[float, float, float]:
    """On the CPU reading is free, and the passes for non-finite elements are made only where there are any."""
    numel = piece.numel()
    if not numel:
        return 0.0, 0.0, 0.0
    low, high = (extreme.item() for extreme in torch.aminmax(piece))
    absmax, nonfinite = max(high, -low), 0.0
    zeros = numel - num_nonzero(piece)
    if not absmax < float("inf"):
        nonfinite = float(numel - int(torch.isfinite(piece).sum()))
        zeros -= int(torch.isnan(piece).sum())
        absmax = float(piece.abs().nan_to_num_(nan=0.0, posinf=torch.inf).max())
    return float(zeros), nonfinite, absmax
