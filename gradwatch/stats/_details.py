"""What a norm does not tell: the largest element, how many are exactly zero, how many are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._counting import num_nonzero
from ._device import scanned
from ._native import native
from ._norms import wide_dtype
from ._shards import Shards, by_dtype

__all__ = ["GradientDetails", "gradient_details", "local_details"]

_WORTH_NATIVE = 1 << 16


@dataclass(frozen=True, eq=False)
class GradientDetails:
    """Details of n tensors, on their device.

    Attributes:
        sums: float64, shape (n, 2): how many elements are exactly zero, and how many inf or nan. Elements that a
            sparse tensor does not store are counted in neither.
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
    details = GradientDetails(sums, maxima, shards if shards.groups else None)
    return details.reduce_() if reduce else details


def local_details(pieces: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return sums (n, 2) and maxima (n, 1) of contiguous local pieces."""
    if not pieces:
        return torch.zeros(0, 2, dtype=torch.float64), torch.zeros(0, 1, dtype=torch.float64)
    if pieces[0].device.type == "cpu":
        table = _on_cpu(pieces)
    elif len(by_dtype(pieces)) == 1 and (found := scanned(pieces, histograms=False)):
        table = found[0][:, 2:]
    else:
        wide = wide_dtype(pieces[0].device)
        table = torch.stack([_anywhere(piece, wide) for piece in pieces])
    return table[:, :2].contiguous(), table[:, 2:].contiguous()


def _on_cpu(pieces: Sequence[Tensor]) -> Tensor:
    table = torch.zeros(len(pieces), 3, dtype=torch.float64)
    for positions in by_dtype(pieces):
        chosen = [pieces[p] for p in positions]
        kernels = native(chosen, worth=_WORTH_NATIVE)
        if kernels is not None:
            table[positions] = torch.from_numpy(kernels.moments(chosen)[:, 2:])
        else:
            table[positions] = torch.tensor([_host_details(piece) for piece in chosen], dtype=torch.float64)
    return table


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


def _anywhere(piece: Tensor, wide: torch.dtype) -> Tensor:
    if not piece.numel():
        return torch.zeros(3, dtype=wide, device=piece.device)
    magnitudes = piece.abs()
    absmax = torch.where(torch.isnan(magnitudes), 0.0, magnitudes).amax()
    counts = [(piece == 0).sum(), (~torch.isfinite(piece)).sum(), absmax]
    return torch.stack([c.to(wide) for c in counts])
