"""Sums from which mean, spread, magnitude and sparsity of a tensor follow, and which merge by addition."""

from __future__ import annotations

import torch
from torch import Tensor

from ._counting import num_nonzero
from ._norms import local_norms, wide_dtype

__all__ = ["MOMENTS", "moments"]

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
    wide = wide_dtype(piece.device)
    numel = piece.numel()
    if not numel:
        return torch.zeros(len(MOMENTS), dtype=wide, device=piece.device)
    if piece.device.type != "cpu":
        return _anywhere(piece, wide)
    total = piece.sum(dtype=torch.promote_types(piece.dtype, torch.float32)).item()
    norm = local_norms([piece]).item()
    low, high = (extreme.item() for extreme in torch.aminmax(piece))
    zeros, nonfinite, absmax = numel - num_nonzero(piece), 0, max(high, -low)
    if not norm < float("inf"):
        magnitudes = piece.abs()
        nonfinite = numel - int(torch.isfinite(piece).sum())
        zeros -= int(torch.isnan(piece).sum())
        absmax = magnitudes.nan_to_num_(nan=0.0, posinf=torch.inf).max().item()
    return torch.tensor([total, norm * norm, zeros, nonfinite, absmax], dtype=torch.float64)


def _anywhere(piece: Tensor, wide: torch.dtype) -> Tensor:
    magnitudes = piece.abs()
    found = [
        piece.sum(dtype=wide),
        torch.linalg.vector_norm(piece, dtype=torch.promote_types(piece.dtype, wide)).square(),
        (piece == 0).sum(),
        (~torch.isfinite(piece)).sum(),
        torch.where(torch.isnan(magnitudes), 0.0, magnitudes).amax(),
    ]
    return torch.stack([value.to(wide) for value in found])
