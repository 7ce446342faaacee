"""A fixed share of a tensor's entries, spread over all of it, that stands for the whole."""

from __future__ import annotations

from math import gcd

from torch import Tensor

__all__ = ["sampled", "share"]

ENTRIES = 4096
"""Of each tensor, at the most about."""


def sampled(tensor: Tensor, entries: int | None = ENTRIES) -> Tensor:
    """Return about so many entries of a tensor, always the same ones, as a view where it is contiguous; shape (k,).

    Args:
        tensor: strided, of any shape.
        entries: None: all of them.
    """
    step = stride(tensor, entries)
    return tensor.reshape(-1)[::step]


def share(tensor: Tensor, entries: int | None = ENTRIES) -> float:
    """Return how many of the tensor's entries each of the sample stands for."""
    return float(stride(tensor, entries))


def stride(tensor: Tensor, entries: int | None) -> int:
    """Return the distance between two entries of the sample: none that a row's length shares a factor with."""
    if entries is None or tensor.numel() <= entries:
        return 1
    step, width = -(-tensor.numel() // entries), tensor.shape[-1]
    while gcd(step, width) > 1:
        step += 1
    return step
