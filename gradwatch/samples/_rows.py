"""Which dimension of a tensor counts the samples.  B samples, T places, F features."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

__all__ = ["batch_axes", "by_sample", "flat_rows"]


def batch_axes(shape: Sequence[int], size: int) -> list[int]:
    """Return the dimensions that may count the samples, likeliest first: the first two, then all others but the
    last."""
    return [axis for axis in range(len(shape)) if shape[axis] == size and (axis < 2 or axis < len(shape) - 1)]


def by_sample(rows: Tensor, lead: Sequence[int] | None, size: int, choice: int = 0) -> Tensor | None:
    """Return rows of features sorted by the sample that they are of: shape (B, T, F). None where that can't be told.

    Args:
        rows: shape (N, F).
        lead: the dimensions that N came of, where known.
        size: B.
        choice: which of the dimensions that may count the samples to take, where there are several.
    """
    num, features = rows.shape
    if num == size:
        return rows.unsqueeze(1)
    if lead is not None:
        axes = [axis for axis in range(len(lead)) if lead[axis] == size]
        if axes:
            axis = axes[choice % len(axes)]
            return rows.reshape(*lead, features).movedim(axis, 0).reshape(size, -1, features)
        if len(lead) > 1 and math.prod(lead[1:]) * lead[0] == num and lead[0] % size:
            return None
    # Samples side by side, their places within them: what `x.view(B * T, F)` makes.
    return rows.reshape(size, num // size, features) if num % size == 0 else None


def flat_rows(tensor: Tensor, size: int) -> Tensor | None:
    """Return a tensor as (B, -1), where its first dimension counts samples, or samples and places; else None."""
    if tensor.dim() == 0 or tensor.size(0) == 0 or tensor.size(0) % size:
        return None
    return tensor.reshape(size, -1)
