"""A fixed share of a tensor's entries, spread over all of it, that stands for the whole."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..torchside import home, moved, sent, wide_dtype

__all__ = ["ENTRIES", "Layout", "packed", "row", "sampled", "share"]

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


class Layout(NamedTuple):
    """Where the samples of several tensors stand in one row.

    Attributes:
        numels: of the samples, in order.
        owners: of each entry, which tensor it is of; (k,).
    """

    numels: tuple[int, ...]
    owners: Tensor

    @classmethod
    def of(cls, samples: Sequence[Tensor], device: torch.device) -> Layout:
        numels = tuple(sample.numel() for sample in samples)
        owners = torch.repeat_interleave(torch.arange(len(numels)), torch.tensor(numels, dtype=torch.int64))
        return cls(numels, sent(owners, device))

    def spread(self, values: Sequence[float] | Tensor, like: Tensor) -> Tensor:
        """Return a number for each tensor as one for each of its entries."""
        rows = values if isinstance(values, Tensor) else sent(torch.tensor(values, dtype=like.dtype), like.device)
        return rows.to(like.dtype).index_select(0, self.owners)

    def sums(self, entries: Tensor) -> Tensor:
        """Return the sum over each tensor's entries, shape (n,)."""
        return entries.new_zeros(len(self.numels)).index_add_(0, self.owners, entries)


def packed(tensors: Sequence[Tensor], entries: int | None, layout: Layout | None) -> tuple[Tensor, Layout]:
    """Return samples of tensors in one row, as a copy, wide; and how they stand there.

    Args:
        tensors: strided.
        entries: of each.
        layout: of the last time; taken again where it is the same.
    """
    samples = [sampled(tensor.detach(), entries) for tensor in tensors]
    device = home(samples)
    wide = wide_dtype(device)
    if layout is None or layout.owners.device != device or layout.numels != tuple(s.numel() for s in samples):
        layout = Layout.of(samples, device)
    flat = torch.cat([moved(sample, device, sample.dtype) for sample in samples])
    return (flat.clone() if len(samples) == 1 and flat.dtype is wide else flat.to(wide)), layout


def row(values: Sequence[Any], like: Tensor) -> Tensor:
    """Return numbers, of which some may lie on a device, as one tensor beside another."""
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([_on(value, like) for value in values])
    return sent(torch.tensor(values, dtype=like.dtype), like.device)


def _on(value: Any, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return moved(value.detach().reshape(()), like.device, like.dtype)
    return torch.full((), value, dtype=like.dtype, device=like.device)
