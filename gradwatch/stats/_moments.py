"""Sums from which mean, spread, magnitude and sparsity of a tensor follow, and which merge by addition."""

from __future__ import annotations

import torch
from torch import Tensor

from ._counting import num_nonzero
from ._device import scanned
from ._native import Native, native_for
from ._norms import local_norms, wide_dtype

__all__ = ["MOMENTS", "extent", "host_extent", "host_moments", "moments", "num_nonfinite"]

_WORTH_NATIVE = 1 << 13
_WORTH_THREADS = 1 << 20

MOMENTS = ("sum", "sumsq", "zeros", "nonfinite", "absmax")
"""What `moments` returns, in order; all but the last merge by addition, the last by maximum."""


@torch.no_grad()
def moments(piece: Tensor) -> Tensor:
    """Return sum, sum of squares, zeros, non-finite elements and largest magnitude of a tensor.

    Args:
        piece: flat, dense and real, of any floating dtype (see `flat_local`); on any device, read by nobody.

    Returns:
        float64, shape (5,), in the order of `MOMENTS`. The two sums are nan or inf where an element is; the largest
        magnitude leaves nan out. All 0 for an empty tensor.
    """
    if piece.device.type == "cpu":
        return torch.tensor(host_moments(piece), dtype=torch.float64)
    if found := scanned([piece], histograms=False):
        return found[0][0]
    wide = wide_dtype(piece.device)
    if not piece.numel():
        return torch.zeros(len(MOMENTS), dtype=wide, device=piece.device)
    return torch.cat([torch.stack([piece.sum(dtype=wide), (piece == 0).sum().to(wide)]), extent(piece)])[
        [0, 2, 1, 3, 4]
    ]


@torch.no_grad()
def extent(piece: Tensor) -> Tensor:
    """Return sum of squares, non-finite elements and largest magnitude of a tensor; float64, shape (3,).

    Args:
        piece: as for `moments`.
    """
    if piece.device.type == "cpu":
        return torch.tensor(host_extent(piece), dtype=torch.float64)
    if found := scanned([piece], histograms=False):
        row = found[0][0]
        return torch.stack([row[1], row[3], row[4]])
    wide = wide_dtype(piece.device)
    if not piece.numel():
        return torch.zeros(3, dtype=wide, device=piece.device)
    magnitudes = piece.abs()
    rest = [
        torch.linalg.vector_norm(piece, dtype=torch.promote_types(piece.dtype, wide)).square(),
        (~torch.isfinite(piece)).sum(),
        torch.where(torch.isnan(magnitudes), 0.0, magnitudes).amax(),
    ]
    return torch.stack([value.to(wide) for value in rest])


def host_moments(piece: Tensor) -> tuple[float, float, float, float, float]:
    """Return `moments` of a CPU tensor of any shape as plain numbers, where reading is free."""
    numel = piece.numel()
    if not numel:
        return 0.0, 0.0, 0.0, 0.0, 0.0
    if kernels := _kernels(piece):
        return kernels.moments_of(piece)
    piece = piece.detach()
    total = piece.sum(dtype=torch.promote_types(piece.dtype, torch.float32)).item()
    sumsq, nonfinite, absmax = host_extent(piece)
    zeros = numel - num_nonzero(piece)
    if nonfinite:
        zeros -= int(torch.isnan(piece).sum())
    return total, sumsq, float(zeros), nonfinite, absmax


def host_extent(piece: Tensor) -> tuple[float, float, float]:
    """Return `extent` of a CPU tensor of any shape as plain numbers."""
    if not piece.numel():
        return 0.0, 0.0, 0.0
    if kernels := _kernels(piece):
        _, sumsq, _, bad, most = kernels.moments_of(piece)
        return sumsq, bad, most
    piece = piece.detach()
    norm = local_norms([piece]).item()
    low, high = torch.aminmax(piece)
    nonfinite, absmax = 0, max(high.item(), -low.item())
    # A finite norm proves that every element is finite.
    if not norm < float("inf"):
        nonfinite = piece.numel() - int(torch.isfinite(piece).sum())
        absmax = piece.abs().nan_to_num_(nan=0.0, posinf=torch.inf).max().item()
    return norm * norm, float(nonfinite), absmax


def num_nonfinite(piece: Tensor) -> Tensor | float:
    """Return how many elements are inf or nan: a number for a CPU tensor, else a 0-dim tensor, unread."""
    if piece.device.type != "cpu":
        return (~torch.isfinite(piece)).sum()
    if kernels := _kernels(piece):
        return kernels.moments_of(piece)[3]
    piece = piece.detach()
    if float(local_norms([piece])) < float("inf"):
        return 0.0
    return float(piece.numel() - int(torch.isfinite(piece).sum()))


def _kernels(piece: Tensor) -> Native | None:
    # Large tensors are read faster by several threads of torch, if there are.
    if piece.numel() > _WORTH_THREADS and torch.get_num_threads() > 1:
        return None
    return native_for(piece, worth=_WORTH_NATIVE)
